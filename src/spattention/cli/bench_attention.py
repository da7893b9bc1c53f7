"""`spattention bench attention`: the kernels beside dense attention and FlexAttention, checked
before they are timed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..bands import BandPattern
from ..benchmarking import results, timing
from ..benchmarking.attend import Attend, Competitor, Tensors
from ..benchmarking.competitors import (
    PATTERNS,
    Flash4,
    FlashSparse,
    bands,
    dense,
    package_versions,
)
from ..benchmarking.flex import Flex, FlexFlash
from ..benchmarking.roofline import Work, work_of
from ..explanation import explain
from ..files import shown
from ..testing import Case, check_case
from .bounds import (
    LARGEST_GRID,
    LARGEST_HEAD_DIM,
    LARGEST_LENGTH,
    LARGEST_SEED,
    check_commit,
    check_each,
    check_output,
    check_range,
    check_size,
)
from .options.bench_attention import Options

CHECKED_LENGTH = 1000  # of the check against float64, whose mask is dense
REST = 0.25  # seconds before each measurement: a power limit looks back over a tenth or two
Shape = tuple[int, int, int]  # batch, heads, length
T = TypeVar("T")
COMPETITOR_ERROR = 0.05  # in outputs of order one, of two kernels in half precision


@dataclass(frozen=True)
class Row:
    """One line of the results. Times in milliseconds, useful work in TFLOP/s, memory in MiB.

    `matrix` is the rate of matrix products that take as long as the call, in TFLOP/s, and `floor`
    the time that the call takes at least.
    """

    batch: int
    heads: int
    length: int
    mask: str
    by: str
    forward: float
    total: float
    eager_forward: float
    eager_total: float
    busy_total: float
    useful_forward: float
    useful_total: float
    useful_flops: int
    compulsory_bytes: int
    matrix: float
    peak_memory: float
    floor: float | None = None
    share_of_floor: float | None = None
    over_dense: float | None = None
    over_flex: float | None = None
    busy_over_dense: float | None = None
    busy_over_flex: float | None = None
    kernels: str = ""


def main(options: Options) -> None:
    """Measure, print, write."""
    shapes, plotted = check(options)
    timing.needs_gpu("bench attention")
    record = results.run_header(options)
    record["environment"] |= package_versions()
    missing: list[str] = []
    record["calls"] = _measure_calls(options)
    record["copy"] = timing.copy_speed()
    rows: list[Row] = []
    for batch, heads, length in dict.fromkeys([*shapes, *plotted]):
        for row in _measure_case(options, batch, heads, length, missing):
            rows.append(_floored(row, record["copy"]))
        record |= {"missing": missing, "rows": [asdict(row) for row in rows]}
        print(f"measured batch {batch}, {heads} heads, length {length}", flush=True)
        if options.output is not None:
            stem = _write(options.output, record, rows, plotted)
    title = "milliseconds by graph replay (busy GPU); useful TFLOP/s; ratios of forward + backward"
    results.show(title, COLUMNS, rows)
    print(" ".join(f"{name}: {value}." for name, value in record["calls"].items()))
    print("\n".join(kernels_that_ran(rows) + not_measured(missing)))
    if options.output is not None:
        print(f"wrote {stem}.json, .md{' and .png' if plotted else ''}")


def check(options: Options) -> tuple[list[Shape], list[Shape]]:
    """The shapes of the table and of the plot; ValueError for an option that breaks a rule."""
    check_range(
        options,
        head_dim=(1, LARGEST_HEAD_DIM),
        seed=(0, LARGEST_SEED),
    )
    if not options.cases and not options.lengths:
        raise ValueError("`--cases` or `--lengths` must name at least one, got none")
    shapes = [_shape(case) for case in options.cases]
    for batch, heads, length in shapes:
        check_each("--cases", [batch], 1, LARGEST_GRID)
        check_each("--cases", [heads], 1, LARGEST_GRID)
        check_each("--cases", [length], 1, LARGEST_LENGTH)
        check_size("--cases", batch=batch, heads=heads, length=length, head_dim=options.head_dim)
    if options.lengths:
        check_each("--lengths", options.lengths, 1, LARGEST_LENGTH)
    plotted = [(1, 16, length) for length in options.lengths]
    for _, heads, length in plotted:
        check_size("--lengths", heads=heads, length=length, head_dim=options.head_dim)
    check_commit(options.commit)
    check_output(options.output)
    return shapes, plotted


def kernels_that_ran(rows: Iterable[Row]) -> list[str]:
    """One line for each form of our kernels: its name, and the cases that ran it."""
    cases: dict[str, list[str]] = {}
    for row in rows:
        if row.kernels:
            case = f"{row.batch}x{row.heads}x{row.length} {row.mask}"
            cases.setdefault(row.kernels, []).append(case)
    return [f"{kernels} ({', '.join(names)})" for kernels, names in cases.items()]


def not_measured(missing: Iterable[str]) -> list[str]:
    """One line for each competitor that did not run, with its reason."""
    return [f"not measured: {reason}" for reason in missing]


def attempt(name: str, missing: list[str], make: Callable[[], T]) -> T | None:
    """The result of a competitor's call; None with the reason added to `missing` where it fails.

    Competitors are optional packages that raise whatever they like where they do not cover a case.
    """
    try:
        return make()
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no reason given"]
        reason = f"{name}: {type(error).__name__}: {lines[0]}"
        if reason not in missing:
            missing.append(reason)
        return None


def _shape(case: str) -> Shape:
    if not re.fullmatch(r"[0-9]{1,10}x[0-9]{1,10}x[0-9]{1,10}", case):
        raise ValueError(
            f"`--cases` must be batch x heads x length, as in 4x16x4096, got {shown(case)}"
        )
    batch, heads, length = (int(part) for part in case.split("x"))
    return batch, heads, length


def _inputs(options: Options, batch: int, heads: int, length: int) -> Tensors:
    generator = torch.Generator("cuda").manual_seed(options.seed)
    shape = (batch, heads, length, options.head_dim)
    query, key, value, d_out = (
        torch.randn(shape, generator=generator, device="cuda", dtype=getattr(torch, options.dtype))
        for _ in range(4)
    )
    return *(tensor.requires_grad_() for tensor in (query, key, value)), d_out


def _measure_case(
    options: Options, batch: int, heads: int, length: int, missing: list[str]
) -> Iterator[Row]:
    """Dense attention, then every pattern with its competitors; what does not run is named in
    `missing`.
    """
    inputs = _inputs(options, batch, heads, length)
    competitors = _competitors(options, inputs, missing)
    everything = BandPattern.dense(heads, length)
    dense_row = None
    for name, attend in dense(inputs).items():
        row = _row(inputs, everything, "dense", f"dense {name}", attend)
        dense_row = dense_row or row  # cuDNN's, the first
        yield _compared(row, dense_row, None)
    assert dense_row is not None
    case = f"{batch}x{heads}x{length}"
    for competitor in competitors:
        if isinstance(competitor, Flash4):
            attend, name = competitor.dense, f"dense {competitor.name}"
            run = partial(_row, inputs, everything, "dense", name, attend)
            found = attempt(f"{name} at {case}", missing, run)
            if found is not None:
                yield _compared(found, dense_row, None)
    for mask, make in PATTERNS.items():
        pattern = make(heads, length)
        _check(options, make, heads, min(length, CHECKED_LENGTH))
        ours = bands(inputs, pattern)
        flex_row = None
        for competitor in competitors:
            run = partial(_competitor_row, inputs, competitor, mask, pattern, ours)
            found = attempt(f"{competitor.name} at {case}, {mask}", missing, run)
            if found is None:
                torch.cuda.empty_cache()
                continue
            if type(competitor) is Flex:
                flex_row = found
            yield _compared(found, dense_row, flex_row)
        row = _row(inputs, pattern, mask, "spattention", ours)
        query, key, value, _ = inputs
        row = replace(row, kernels=explain(query, key, value, pattern, impl="triton").kernels)
        yield _compared(row, dense_row, flex_row)


def _competitors(options: Options, inputs: Tensors, missing: list[str]) -> list[Competitor]:
    """Those that were asked for and can be imported."""
    asked: list[tuple[bool, Callable[[Tensors], Competitor], str]] = [
        (options.flex, Flex, Flex.name),
        (options.flex_flash, FlexFlash, FlexFlash.name),
        (options.flash4, Flash4, Flash4.name),
        (options.flash_sparse, FlashSparse, FlashSparse.name),
    ]
    found = (attempt(name, missing, partial(make, inputs)) for on, make, name in asked if on)
    return [competitor for competitor in found if competitor is not None]


def _competitor_row(
    inputs: Tensors,
    competitor: Competitor,
    mask: str,
    pattern: BandPattern,
    ours: Attend,
) -> Row:
    attend = competitor.on(pattern)
    _check_competitor(competitor.name, mask, attend, ours)
    return _row(inputs, pattern, mask, competitor.name, attend)


def _floored(row: Row, copy: float) -> Row:
    """The row with its floor, from the rate of a copy in TB/s."""
    floor = Work(row.useful_flops, row.compulsory_bytes).limit(row.matrix, copy)
    return replace(row, floor=floor, share_of_floor=floor / row.total)


def _compared(row: Row, dense_row: Row, flex_row: Row | None) -> Row:
    row = replace(
        row,
        over_dense=dense_row.total / row.total,
        busy_over_dense=dense_row.busy_total / row.busy_total,
    )
    if flex_row is None:
        return row
    return replace(
        row,
        over_flex=flex_row.total / row.total,
        busy_over_flex=flex_row.busy_total / row.busy_total,
    )


@torch.no_grad()
def _check_competitor(name: str, mask: str, attend: Attend, ours: Attend) -> None:
    """The same mask, or the comparison is none. RuntimeError unless the outputs agree."""
    out, other = ours(), attend()
    if attend.tokens_first:
        other = other.transpose(1, 2)
    seen = out.abs().amax(-1, keepdim=True) > 0  # what a query without keys gets is everyone's own
    error = ((other - out) * seen).abs().max().item()
    if not error < COMPETITOR_ERROR:
        raise RuntimeError(f"the output of {name} on {mask} differs by {error}")


def _check(
    options: Options, make: Callable[[int, int], BandPattern], heads: int, length: int
) -> None:
    """The correctness gate: the kernel and its gradients against float64, within the budget of
    `testing.py`.
    """
    query, key, value, _ = _inputs(options, 1, heads, length)
    case = Case(query.detach(), key.detach(), value.detach(), make(heads, length))
    check_case(case, impl="triton")


def _row(inputs: Tensors, pattern: BandPattern, mask: str, by: str, attend: Attend) -> Row:
    query = inputs[0]
    batch, heads, length, _ = query.shape

    def forward() -> None:
        with torch.no_grad():
            attend()

    def total() -> None:
        attend.backward(attend())

    one_pass, both = work_of(pattern, [length] * batch, query, inputs[1])
    forward_time, total_time = (
        timing.graph_milliseconds(call, rest=REST) for call in (forward, total)
    )
    return Row(
        batch=batch,
        heads=heads,
        length=length,
        mask=mask,
        by=by,
        forward=forward_time,
        total=total_time,
        eager_forward=timing.eager_milliseconds(forward),
        eager_total=timing.eager_milliseconds(total),
        busy_total=timing.busy_milliseconds(total),
        useful_forward=one_pass.flops / forward_time / 1e9,
        useful_total=both.flops / total_time / 1e9,
        useful_flops=both.flops,
        compulsory_bytes=both.moved,
        matrix=timing.matrix_speed(total_time, rest=REST),
        peak_memory=timing.peak_bytes(total) / 2**20,
    )


def _measure_calls(options: Options) -> dict[str, str]:
    """Host time of a call, and the time that the first call of a process costs when nothing is
    compiled yet.
    """
    inputs = _inputs(options, 1, 8, 256)
    query, key, value, d_out = inputs

    def attend_dense() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    calls = {
        "spattention": bands(inputs, BandPattern.shared_local(8, 256)),
        "scaled_dot_product_attention": Attend(attend_dense, inputs),
    }
    found = {}
    for name, attend in calls.items():
        out = attend()

        def backward(out: Tensor = out) -> None:
            torch.autograd.grad(out, (query, key, value), d_out, retain_graph=True)

        with torch.no_grad():
            forward_time = timing.host_microseconds(attend)
        backward_time = timing.host_microseconds(backward)
        found[f"host time of {name}"] = (
            f"{forward_time:.0f} us forward, {backward_time:.0f} us backward"
        )
    found["first call of a process with an empty cache"] = timing.first_call(
        options.head_dim, options.dtype
    )
    return found


COLUMNS: dict[str, Callable[[Row], str]] = {
    "B, H, N": lambda row: f"{row.batch}, {row.heads}, {row.length}",
    "mask": lambda row: row.mask,
    "by": lambda row: row.by,
    "forward": lambda row: f"{row.forward:.3f}",
    "backward": lambda row: f"{row.total - row.forward:.3f}",
    "total": lambda row: f"{row.total:.3f} ({row.busy_total:.3f})",
    "eager total": lambda row: f"{row.eager_total:.3f}",
    "TFLOP/s fwd": lambda row: f"{row.useful_forward:.0f}",
    "TFLOP/s": lambda row: f"{row.useful_total:.0f}",
    "matrix": lambda row: f"{row.matrix:.0f}",
    "floor": lambda row: "" if row.floor is None else f"{row.floor:.3f}",
    "share": lambda row: "" if row.share_of_floor is None else f"{row.share_of_floor:.0%}",
    "peak MiB": lambda row: f"{row.peak_memory:.0f}",
    "x dense": lambda row: _ratio(row.over_dense, row.busy_over_dense),
    "x flex": lambda row: _ratio(row.over_flex, row.busy_over_flex),
}


def _ratio(rested: float | None, busy: float | None) -> str:
    return "" if rested is None or busy is None else f"{rested:.2f} ({busy:.2f})"


def _write(
    folder: Path, record: dict[str, Any], rows: list[Row], plotted: list[tuple[int, int, int]]
) -> Path:
    stem = results.write_page(
        folder,
        "attention",
        record,
        (
            *(f"- {name}: {value}" for name, value in record["calls"].items()),
            f"- a copy moves {record['copy']:.2f} TB/s",
            *(f"- {line}" for line in kernels_that_ran(rows)),
            *(f"- {line}" for line in not_measured(record["missing"])),
            "",
            "Milliseconds, medians of graph replays on a rested GPU (`eager total`: plain calls); "
            "in brackets: on one that has been busy with the call for 0.4 s. TFLOP/s count "
            "attended pairs alone; `matrix`: what matrix products reach that take as long.",
        ),
        COLUMNS,
        rows,
    )
    shown = [row for row in rows if (row.batch, row.heads, row.length) in plotted]
    if shown:
        _plot(stem.with_suffix(".png"), shown, record["environment"]["gpu"])
    return stem


def _plot(path: Path, shown: list[Row], gpu: str) -> None:
    from matplotlib.figure import Figure

    masks = [mask for mask in dict.fromkeys(row.mask for row in shown) if mask != "dense"]
    names = list(dict.fromkeys(row.by for row in shown))
    figure = Figure(figsize=(4 * len(masks), 4), layout="constrained")
    for axes, mask in zip(figure.subplots(1, len(masks), sharey=True, squeeze=False)[0], masks):
        for k, name in enumerate(names):
            line = sorted(
                (row.length, row.over_dense)
                for row in shown
                if row.by == name and row.mask in (mask, "dense") and row.over_dense is not None
            )
            style = "--^" if name.startswith("dense") else "-o" if name == "spattention" else ":s"
            axes.plot(*zip(*line), style, color=f"C{k}", label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("length in tokens (batch 1, 16 heads)")
        axes.set_title(mask)
        axes.grid(alpha=0.3)
    first = figure.axes[0]
    first.set_ylabel("times faster than dense cuDNN")
    first.legend(fontsize="small")
    figure.suptitle(f"Attention on {gpu}, forward + backward")
    figure.savefig(path, dpi=160)
