"""Sides take turns, each in the process of its own source tree."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spattention.impl.triton import hopper
from spattention.impl.triton.hopper import planning

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "kernels_in_turns.py"


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_medians_are_compared_with_the_first_side(
    script: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    sides = {
        "old": [{"case": 1.0}, {"case": 2.0}, {"case": 9.0}],
        "new": [{"case": 1.0}, {"case": 1.0}, {"case": 5.0}],
    }
    assert script["summary"](sides) == [("case", [2.0, 1.0])]
    script["show"](sides)
    assert capsys.readouterr().out.splitlines()[-1].split() == ["case", "2.0000", "1.0000", "0.500"]


def test_sides_run_in_turns_and_results_are_written(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def run_side(path: str, *cases: object) -> dict[str, Any]:
        ran.append(Path(path).name)
        return {"times": {"case": float(len(ran))}, "triton": "3.6.0"}

    arguments = ["--turns", "2", "--output", str(tmp_path / "new" / "times.json")]
    sides = ["--side", f"a={tmp_path / 'one'}", "--side", f"b={tmp_path / 'two'}"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *sides, *arguments])
    main = script["main"]
    monkeypatch.setitem(main.__globals__, "run_side", run_side)
    assert main() == 0
    assert ran == ["one", "two", "two", "one"]
    written = json.loads((tmp_path / "new" / "times.json").read_text())
    assert written["medians"] == {"case": {"a": 2.5, "b": 2.5}}


def test_another_source_tree_is_refused(script: dict[str, Any], tmp_path: Path) -> None:
    """The process of a side says which tree it imported."""
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "sitecustomize.py").write_text(
        'import os\nprint(\'{"source": "/elsewhere", "times": {}}\', flush=True)\nos._exit(0)\n'
    )
    with pytest.raises(RuntimeError, match="imported spattention from /elsewhere"):
        script["run_side"](str(fake), ["1x8x4096"], ["exclusive"], 1)


def test_a_side_runs_with_another_plan(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fields take the plan's types, and only the side that is named has them."""
    ran: list[tuple[str, ...]] = []

    def run_side(path: str, shapes: Any, names: Any, places: Any, settings: Any) -> dict[str, Any]:
        ran.append(tuple(settings))
        return {"times": {"case": 1.0}}

    sides = ["--side", f"a={tmp_path}", "--side", f"b={tmp_path}", "--turns", "1"]
    plan = ["--plan", "b", "persistent=true", "order=0", "waves=8"]
    main = script["main"]
    monkeypatch.setitem(main.__globals__, "run_side", run_side)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *sides, *plan])
    assert main() == 0
    assert ran == [(), ("persistent=true", "order=0", "waves=8")]
    by_rule = hopper.HopperPlan(planning.LAUNCHES[128], hopper.TileOrder.PAIRED, False, True)
    fake = SimpleNamespace(plan=lambda covered: by_rule if covered else None)
    script["change_plans"](fake, script["fields_of"](ran[1]))
    found = fake.plan(True)
    assert found == replace(by_rule, persistent=True, order=hopper.TileOrder.HEAD_MAJOR, waves=8)
    assert isinstance(found.order, hopper.TileOrder)
    assert fake.plan(False) is None
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *sides, "--plan", "c", "waves=8"])
    with pytest.raises(SystemExit):
        main()


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [("4x16x4096", (4, 16, 16, 4096, 128)), ("1x32/8x16384x64", (1, 32, 8, 16384, 64))],
)
def test_shapes_have_key_heads(script: dict[str, Any], shape: str, sizes: tuple[int, ...]) -> None:
    assert script["sizes_of"](shape) == sizes
