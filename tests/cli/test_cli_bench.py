"""The measuring commands where there is no GPU to measure."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spattention import BandPattern, band_attention
from spattention.benchmarking import results, timing
from spattention.benchmarking.attend import Attend
from spattention.benchmarking.competitors import (
    PATTERNS,
    bands,
    import_below,
    window_sizes,
)
from spattention.benchmarking.roofline import Work, work_of
from spattention.cli import bench, bench_attention, bench_decode, main, tune


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    "command", [["bench"], ["bench", "attention"], ["bench", "decode"], ["tune"]]
)
def test_without_a_gpu_it_says_so(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_a_case_that_is_no_shape_is_named() -> None:
    assert bench_attention._shape("4x16x4096") == (4, 16, 4096)
    with pytest.raises(ValueError, match="got '4x16'"):
        bench_attention._shape("4x16")


def test_defaults_are_the_cases_of_the_log() -> None:
    chosen = bench.Options().what
    assert isinstance(chosen, bench_attention.Options)
    assert chosen.cases[-1] == "1x16x65536"
    assert bench_decode.Options().lengths[-1] == 65536
    assert tune.Options().head_dim == 128


def test_compulsory_keys_are_counted_once_per_group() -> None:
    pattern = BandPattern((((0, 3),), ((1, 5),), (), ((2, 4), (10, 20))), 20)
    assert bench_decode.compulsory(pattern, 2, 1, 12) == 5 + 4
    assert bench_decode.compulsory(pattern, 4, 1, 12) == 3 + 4 + 0 + 4
    assert bench_decode.compulsory(pattern, 4, 2, 12) == 4 + 5 + 0 + 3 + 2


class Clock:
    """The GPU's time in milliseconds, for events; between two, the first launch adds `late`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, late: float = 0.0) -> None:
        self.now, self.late = 0.0, late
        self.between: list[float] = []
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


class Event:
    def __init__(self, clock: Clock) -> None:
        self.clock, self.time = clock, 0.0

    def record(self) -> None:
        self.time = self.clock.now

    def elapsed_time(self, end: Event) -> float:
        self.clock.between.append(end.time - self.time)
        return end.time - self.time + self.clock.late


@pytest.mark.parametrize(
    ("cost", "together", "calls"), [(0.1, 1.0, 10), (0.01, 1.0, 20), (4.0, 1.0, 1), (0.1, 0.0, 1)]
)
def test_short_calls_are_timed_together(
    cost: float, together: float, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, late=0.006)

    def call() -> None:
        clock.now += cost

    found = timing._median_milliseconds(call, budget=20.0, together=together)
    between = [round(time / cost) for time in clock.between]
    assert found == pytest.approx(cost + clock.late / between[-1])
    assert between[-1] == pytest.approx(calls, abs=1)
    assert len(between) >= 11  # two to see how long it takes, and nine
    assert clock.now < max(20.0, 11 * cost * calls) + 3 * cost * calls


@pytest.mark.parametrize(("duration", "size", "products"), [(0.05, 4096, 1), (10.0, 8192, 5)])
def test_products_last_as_long_as_the_call(
    duration: float, size: int, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rate is that of as many products as take the time of the call, rested like it."""
    made: list[int] = []

    def milliseconds(call: Callable[[], None], **options: float) -> float:
        before = len(made)
        call()
        assert options.get("rest", 0.3) == 0.3
        return 2.0 * (len(made) - before)

    monkeypatch.setattr(timing, "graph_milliseconds", milliseconds)
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: torch.empty(shape, device="meta"))
    monkeypatch.setattr(torch, "mm", lambda left, right, out: made.append(left.shape[0]))
    found = timing.matrix_speed(duration, rest=0.3)
    assert made == [size] * (products + 1)
    assert found == pytest.approx(2 * size**3 / 2.0 / 1e9)


def test_the_limit_is_of_products_or_of_bytes() -> None:
    query, key = torch.zeros(2, 4, 64, 16), torch.zeros(2, 2, 64, 16)
    forward, both = work_of(BandPattern.exclusive(4, 64), [64, 64], query, key)
    pairs = 2 * 64 * 65 // 2  # all heads together have every causal pair once
    assert (forward.flops, both.flops) == (4 * 16 * pairs, 14 * 16 * pairs)
    assert forward.moved == 4 * (2 * 2 * 4 * 64 * 16 + 2 * 2 * 2 * 64 * 16)
    assert both.moved == 3 * forward.moved
    assert Work(600, 4).limit(matrix=2.0, copy=2.0) == 300 / 1e9
    assert Work(600, 4000).limit(matrix=2.0, copy=2.0) == 2000 / 1e9


def test_a_busy_gpu_is_measured_when_it_has_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU slows down after 300 ms of work, to half of its speed."""
    clock = Clock(monkeypatch)

    def replay() -> None:
        clock.now += 1.0 if clock.now < 300.0 else 2.0

    monkeypatch.setattr(timing, "_captured", lambda call: replay)
    assert timing.busy_milliseconds(lambda: None) == 2.0
    assert clock.now < 1200.0


@pytest.fixture
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the clock and the machine: a call is made once and takes a millisecond."""

    def milliseconds(call: Callable[[], Any]) -> float:
        call()
        return 1.0

    monkeypatch.setattr(bench_decode, "DEVICE", "cpu")
    monkeypatch.setattr(timing, "needs_gpu", lambda command: None)
    monkeypatch.setattr(timing, "copy_speed", lambda: 4.0)
    monkeypatch.setattr(timing, "graph_milliseconds", milliseconds)
    monkeypatch.setattr(timing, "eager_milliseconds", milliseconds)
    monkeypatch.setattr(results, "environment", lambda: {"gpu": "None X1", "commit": "?"})


@pytest.mark.usefixtures("without_a_gpu")
def test_decode_names_what_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Decode measures what runs and names what does not."""
    command = ["bench", "decode", "--lengths", "64", "96", "--batches", "1", "2", "--heads", "4"]
    command += ["--key-heads", "2", "--head-dim", "16", "--no-flex", "--commit", "abc"]
    assert main([*command, "--output", str(tmp_path)]) == 0
    (results,) = tmp_path.glob("decode_x1_*.json")
    assert results.with_suffix(".png").stat().st_size > 10_000
    found = json.loads(results.read_text())
    assert found["environment"]["commit"] == "abc"
    assert all(any(name in m for m in found["missing"]) for name in ("cuDNN", "efficient"))
    rows = [row for row in found["rows"] if (row["batch"], row["length"]) == (2, 96)]
    assert {row["by"] for row in rows if row["mask"] == "dense"} >= {"dense math"}
    ours = [(row["mask"], row["layout"]) for row in rows if row["by"] == "spattention"]
    assert ours == [(m, layout) for m in PATTERNS for layout in ("all keys", "BandStore")]
    moved = 2 * 96 * 2 * 2 * 16 * 2  # both key/value heads reach everything, together once
    assert rows[0]["speed"] == pytest.approx(moved / 1e9)
    table = results.with_suffix(".md").read_text()
    assert table.count("| spattention | BandStore |") == 4 * len(PATTERNS)
    assert "wrote" in capsys.readouterr().out


@pytest.mark.usefixtures("without_a_gpu")
def test_the_gate_of_decode_stops_a_wrong_result() -> None:
    cache = bench_decode._cache(bench_decode.Options(heads=2, head_dim=16), 2, 50)
    pattern = BandPattern.exclusive(2, 50)
    out = band_attention(*cache, pattern)
    bench_decode.check(cache, pattern, out)
    out[1, 1] += 0.1
    with pytest.raises(AssertionError, match="row 1, head 1"):
        bench_decode.check(cache, pattern, out)


@pytest.mark.usefixtures("without_a_gpu")
def test_each_case_is_written_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is measured is written before the next case."""

    def measured(
        options: Any, batch: int, heads: int, length: int, missing: list[str]
    ) -> list[bench_attention.Row]:
        missing[:] = ["flash-sparse-attn: ModuleNotFoundError: no module"]
        if length == 64:
            raise KeyboardInterrupt
        names = ("forward", "total", "eager_forward", "eager_total", "busy_total")
        times = dict.fromkeys(names, 1.0)
        work = dict.fromkeys(("useful_forward", "useful_total", "peak_memory"), 1.0)
        work |= {"useful_flops": 3 * 10**11, "compulsory_bytes": 2 * 10**9, "matrix": 600.0}
        row = bench_attention.Row(batch, heads, length, "exclusive", "spattention", **times, **work)
        row = bench_attention.replace(row, kernels="portable kernels")
        dense = bench_attention.replace(row, mask="dense", by="dense cuDNN", total=2.0, kernels="")
        return [bench_attention._compared(each, dense, None) for each in (dense, row)]

    monkeypatch.setattr(bench_attention, "_measure_case", measured)
    monkeypatch.setattr(bench_attention, "_measure_calls", lambda options: {"host": "fast"})
    options = bench_attention.Options(
        cases=("1x8x16",), lengths=(32, 64), output=tmp_path, flash4=False
    )
    with pytest.raises(KeyboardInterrupt):
        bench_attention.main(options)
    (found,) = tmp_path.glob("attention_*.json")
    assert [row["length"] for row in json.loads(found.read_text())["rows"]] == [16, 16, 32, 32]
    assert "| 1, 8, 16 | exclusive |" in found.with_suffix(".md").read_text()
    missing = "not measured: flash-sparse-attn: ModuleNotFoundError: no module"
    assert f"- {missing}" in found.with_suffix(".md").read_text()
    assert json.loads(found.read_text())["missing"] == [missing.removeprefix("not measured: ")]
    cases = "1x8x16 exclusive, 1x16x32 exclusive"
    assert f"- portable kernels ({cases})" in found.with_suffix(".md").read_text()
    assert "| 1.000 (1.000) |" in found.with_suffix(".md").read_text()
    assert "| 2.00 (1.00) |" in found.with_suffix(".md").read_text()
    row = json.loads(found.read_text())["rows"][1]
    assert row["floor"] == row["share_of_floor"] == 0.5  # products at 600 TFLOP/s, or bytes at 4
    assert "| 600 | 0.500 | 50% |" in found.with_suffix(".md").read_text()
    assert found.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


class Breaks:
    """A competitor that cannot be imported, or that cannot express a mask."""

    name = "other"

    def __init__(self, inputs: Any) -> None:
        raise RuntimeError("needs a GPU of the future\nand more")


class Wrong:
    name = "wrong"

    def __init__(self, inputs: Any) -> None:
        self.inputs = inputs

    def on(self, pattern: BandPattern) -> Attend:
        return Attend(lambda: self.inputs[2] + 1.0, self.inputs)


def test_competitors_that_fail_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an import that fails nor a wrong output is left out without its reason."""
    shape = (1, 2, 16, 4)
    inputs = tuple(torch.randn(shape, requires_grad=True) for _ in range(3))
    inputs = (*inputs, torch.randn(shape))

    def row(*given: Any) -> Any:
        return given[3]  # the name

    monkeypatch.setattr(bench_attention, "Flex", Breaks)
    monkeypatch.setattr(bench_attention, "FlexFlash", Wrong)
    monkeypatch.setattr(bench_attention, "_inputs", lambda *given: inputs)
    monkeypatch.setattr(bench_attention, "_check", lambda *given: None)
    monkeypatch.setattr(bench_attention, "dense", lambda given: {"cuDNN": bands})
    monkeypatch.setattr(bench_attention, "_row", row)
    monkeypatch.setattr(bench_attention, "_compared", lambda row, dense, flex: row)
    monkeypatch.setattr(bench_attention, "replace", lambda row, **given: row)
    options = bench_attention.Options(flash4=False)
    missing: list[str] = []
    rows = list(bench_attention._measure_case(options, 1, 2, 16, missing))
    assert rows == ["dense cuDNN", *["spattention"] * len(PATTERNS)]
    assert missing[0] == "other: RuntimeError: needs a GPU of the future"
    assert missing[1].startswith("flash-sparse-attn: ModuleNotFoundError")
    wrong = [reason for reason in missing if reason.startswith("wrong at 1x2x16, ")]
    assert len(wrong) == len(PATTERNS)
    assert all("RuntimeError: the output of wrong on" in reason for reason in wrong)


@pytest.mark.parametrize("make", PATTERNS.values(), ids=PATTERNS)
def test_windows_of_flash_sparse_attn(make: Callable[[int, int], BandPattern]) -> None:
    """Distances that its kernels keep: `[0, near)` and the window `right` beyond it."""
    pattern = make(8, 64)
    distance = torch.arange(64)[:, None] - torch.arange(64)
    for seen, (sink, left, right, near) in zip(pattern.mask(64), window_sizes(pattern)):
        first = near + right
        kept = (distance < near) | ((distance >= first) & (distance < first + left))
        assert sink == 0
        assert torch.equal(seen, kept & (distance >= 0))


def test_windows_that_cannot_be_expressed() -> None:
    with pytest.raises(ValueError, match="start with distance 0"):
        window_sizes(BandPattern((((1, 3), (5, 7)),), 8))
    assert window_sizes(BandPattern(((), ((2, 5),), ((0, 3),)), 8)) == [
        (0, 0, 0, 0),
        (0, 3, 2, 0),
        (0, 0, 0, 3),
    ]


def test_windows_of_grouped_heads_are_one_per_key_head() -> None:
    grouped = BandPattern.shared_local(4, 64, kv_heads=2, prefix=3)
    assert window_sizes(grouped, 2) == [(3, *sizes[1:]) for sizes in window_sizes(grouped)[::2]]
    with pytest.raises(ValueError, match="equal bands in each group of 2 heads"):
        window_sizes(BandPattern.shared_local(4, 64), 2)


def test_a_module_is_imported_below_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "heavy_package"
    (package / "ops").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('needs more')\n")
    (package / "ops" / "__init__.py").write_text("")
    (package / "ops" / "cute.py").write_text("VALUE = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert import_below("heavy_package", "ops.cute").VALUE == 3
    finally:
        for name in [name for name in sys.modules if name.startswith("heavy_package")]:
            del sys.modules[name]
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        import_below("no_such_package", "ops")


def test_wall_time_leaves_out_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slow calls, then calls of one second: the median of those that count."""
    now, costs = 0.0, [9.0, 5.0, 1.0, 1.0, 4.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)

    def call() -> None:
        nonlocal now
        now += costs.pop(0)

    assert timing.wall_seconds(call, 3, warm_up=2) == 1.0
    assert costs == []
