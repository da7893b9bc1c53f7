"""`spattention tune` in the interpreter: all of it but the clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from triton.runtime.errors import OutOfResources

from spattention.benchmarking import timing
from spattention.cli import main, tune
from spattention.impl.triton.config import LaunchConfig
from spattention.impl.triton.portable import launch as portable

COMMAND = [
    *("tune", "--heads", "2", "--length", "32", "--head-dim", "16", "--dtype", "float32"),
    *("--blocks", "16", "32", "--warps", "1", "--stages", "1"),
]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Times that are told instead of measured, the last one first; the call is made."""
    times: list[float] = []

    def milliseconds(call: Callable[[], Any], budget: float) -> float:
        call()
        return times.pop() if times else 1.0

    monkeypatch.setattr(tune, "DEVICE", "cpu")
    monkeypatch.setattr(timing, "needs_gpu", lambda command: None)
    monkeypatch.setattr(timing, "graph_milliseconds", milliseconds)
    return times


def test_every_launch_is_tried_and_ranked(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    clock += [4.0, 2.0, 3.0, 5.0] * 3
    assert main([*COMMAND, "--best", "2"]) == 0
    out = capsys.readouterr().out
    for name in tune.PORTABLE:
        assert out.count(f"{name}: ") == 4
        table = out.split(f"portable kernels, {name}")[1].split("└")[0]
        assert "2.0000" in table
        assert table.index("2.0000") < table.index("3.0000")
        assert "4.0000" not in table


@pytest.mark.usefixtures("clock")
def test_each_launch_is_shown_before_the_next_is_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    launch = portable.key_gradient

    def watched(*arguments: Any) -> None:
        shown.append(capsys.readouterr().out.count("key_gradient: "))
        launch(*arguments)

    monkeypatch.setattr(portable, "key_gradient", watched)
    assert main([*COMMAND, "--passes", "key_gradient"]) == 0
    assert shown == [0, 1, 1, 1]


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OutOfResources(300_000, 232_448, "shared memory"), "too large for this GPU"),
        (RuntimeError("PassManager::run failed"), "not compiled by this Triton"),
    ],
)
def test_a_launch_that_cannot_run_is_said_and_left_out(
    error: Exception,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    launch = portable.query_gradient

    def narrow(call: Any, config: LaunchConfig, *arguments: Any) -> None:
        if config.block_m == 32:
            raise error
        launch(call, config, *arguments)

    monkeypatch.setattr(portable, "query_gradient", narrow)
    assert main([*COMMAND, "--passes", "query_gradient"]) == 0
    lines, table = capsys.readouterr().out.split("portable kernels")
    assert lines.count(reason) == 2
    assert "block_m=32" not in table
    assert table.count("block_m=16") == 2


@pytest.mark.usefixtures("clock")
def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(portable, "query_gradient", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        tune.main(tune.Options(head_dim=16, length=32, passes=("query_gradient",)))


@pytest.mark.usefixtures("clock")
def test_hopper_kernels_that_cannot_run_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fit = ["--blocks", "64", "128", "--warps", "4"]  # launches of these kernels, elsewhere
    assert main([*COMMAND, "--kernels", "hopper", *fit]) == 2
    assert "`--kernels hopper` does not cover" in capsys.readouterr().err


def test_the_default_grid_is_short() -> None:
    """At a second each, compilation stays under half a minute on Hopper, and a minute elsewhere."""
    options = tune.Options()
    portable = [tune.candidates(options, name, False) for name in tune.passes(options, False)]
    hopper = [tune.candidates(options, name, True) for name in tune.passes(options, True)]
    assert [len(launches) for launches in portable] == [18, 18, 18]
    assert [len(launches) for launches in hopper] == [6, 3, 2]
    assert all(launch.block_m == 16 * launch.num_warps for launch in hopper[0] + hopper[2])
    assert all(launch.block_n == 16 * launch.num_warps for launch in hopper[2])
    assert all(launch.block_m == 32 * launch.num_warps for launch in hopper[1])


@pytest.mark.parametrize(("hopper", "name"), [(True, "key_gradient"), (False, "backward")])
def test_unknown_passes_are_refused(hopper: bool, name: tune.Pass) -> None:
    with pytest.raises(ValueError, match=rf"`--passes` of the \w+ kernels .*got {name}"):
        tune.passes(tune.Options(passes=(name,)), hopper)
