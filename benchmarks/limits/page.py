"""Write the tables of docs/performance.md, and its picture, from the newest results: no figure by
hand. Every `<!-- limits: NAME -->` of the page is followed by the part NAME, up to the next
`<!-- end -->`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spattention import markdown
from spattention.files import write_atomically

from . import chart
from .cases import (
    ANY_ORDER,
    DECODE,
    DENSE,
    FLASH_4,
    FLASH_SPARSE,
    FLEX,
    FLEX_FLASH,
    OURS,
    PAGED,
    Case,
)
from .results import NOT_REACHED, Line, Results, newest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "images" / "limits.png"
MARK = re.compile(r"(<!-- limits: ([a-z-]+) -->\n).*?(<!-- end -->)", re.S)
CUDNN, FLASH_2, DENSE_4 = DENSE
HEADINGS = {
    OURS: "spattention",
    ANY_ORDER: "any order",
    PAGED: "paged",
    FLEX: "Flex",
    FLEX_FLASH: "Flex FLASH",
    FLASH_4: "FA-4",
    FLASH_SPARSE: "FSA",
    CUDNN: "dense cuDNN",
    FLASH_2: "dense FA-2",
    DENSE_4: "dense FA-4",
}


def main() -> None:
    """Fill the marked parts of the page and draw its picture."""
    file = newest()
    if file is None:
        raise SystemExit("there must be a file of results, benchmarks/results/limits_*.json")
    results = Results.read(file)
    text = PAGE.read_text(encoding="utf-8")
    write_atomically(PAGE, render(text, results, file.name))
    chart.draw(results, PICTURE, chart.source_of(file))


def render(text: str, results: Results, name: str) -> str:
    """The page with its parts from these results.

    Args:
        text: the page, whose parts may be of other results.
        results: of the run.
        name: of their file.
    """

    def fill(found: re.Match[str]) -> str:
        if found[2] not in PARTS:
            raise SystemExit(f"a part must be one of {sorted(PARTS)}, got {found[2]}")
        return f"{found[1]}{PARTS[found[2]](results, name)}{found[3]}"

    return MARK.sub(fill, text)


def run(results: Results, name: str) -> str:
    """The machine, and how often this library is the fastest."""
    facts = results.environment
    packages = [f"{each} {facts[each]}" for each in ("torch", "triton") if each in facts]
    packages += [f"{each} {facts[each]}" for each in ("flash-attn-4", "flash-sparse-attn")
                 if each in facts]  # fmt: skip
    rows = [row for row in results.rows.values() if "copy" in row]
    copies = [row["copy"] for row in rows]
    products = [rate for row in rows for rate in row.get("matrix", ())]
    rates = [f"copies reach {min(copies):.2f} to {max(copies):.2f} TB/s"]
    if products:
        rates.append(f"matrix products {min(products):.0f} to {max(products):.0f} TFLOP/s")
    text = (
        f"{facts['gpu']}, {', '.join(packages)} ([results](../benchmarks/results/{name})); "
        f"{' and '.join(rates)}."
    )
    for which, passes in (("total", "forward and backward"), ("forward", "forward")):
        lines = [line for line in results.lines(which) if line.competitors]
        ahead = [line for line in lines if line.times[OURS] <= min(line.competitors.values())]
        text += f" {passes.capitalize()}, spattention is the fastest in {len(ahead)} of "
        text += f"{len(lines)} cases that a competitor ran."
    runs: dict[tuple[Any, ...], set[int]] = {}
    for case, row in results.rows.items():
        runs.setdefault(case.place, set()).add(row["run"])
    count = len(results.record["environments"])
    if count > 1:
        text += f" {count} runs, on GPUs of this name"
        split = sorted(
            {f"{p[0]} {p[1]} x {p[2]} x {p[4]:,}" for p, of in runs.items() if len(of) > 1}
        )
        text += f"; of more than one: {', '.join(split)}." if split else "; each shape is of one."
    return text + "\n"


def losses(results: Results, name: str) -> str:
    """Every case in which a competitor is faster than the deterministic default, and how the sums
    in any order compare where they have kernels of their own.
    """
    rows = []
    for which, passes in (("total", "forward + backward"), ("forward", "forward")):
        for line in results.lines(which):
            ours = line.times[OURS]
            by, time = min(line.competitors.items(), key=lambda item: item[1], default=(OURS, ours))
            if time < ours:
                cells = [place(line), passes, HEADINGS[by], f"{ours / time:.2f}"]
                other = line.times.get(ANY_ORDER, ours) if which == "total" else ours
                cells.append("-" if other == ours else f"{other / time:.2f}")
                rows.append(cells)
    if not rows:
        return "No competitor that ran is faster in any of these cases.\n"
    headings = ["case", "pass", "faster is", "our time over its", "in any order"]
    return "\n".join(markdown.table(headings, rows)) + "\n"


def multi_head(which: str) -> Callable[[Results, str], str]:
    """Table of the pass over heads of 128, as many key/value heads as query heads."""
    columns: tuple[str, ...] = (
        OURS, ANY_ORDER, FLEX, FLEX_FLASH, FLASH_4, FLASH_SPARSE, CUDNN, DENSE_4,
    )  # fmt: skip
    if which == "forward":
        columns = tuple(by for by in columns if by != ANY_ORDER)
    return lambda results, name: table(
        [line for line in results.lines(which) if _is_multi_head(line)], columns
    )


def grouped(which: str) -> Callable[[Results, str], str]:
    """Table of the pass with grouped queries."""
    columns: tuple[str, ...] = (
        OURS, ANY_ORDER, FLEX, FLEX_FLASH, FLASH_4, FLASH_SPARSE, CUDNN, FLASH_2, DENSE_4,
    )  # fmt: skip
    if which == "forward":
        columns = tuple(by for by in columns if by != ANY_ORDER)
    return lambda results, name: table(
        [
            line
            for line in results.lines(which)
            if line.case.variant != DECODE and not _is_multi_head(line)
        ],
        columns,
    )


def decoding(results: Results, name: str) -> str:
    """Table of decoding."""
    columns = (OURS, PAGED, FLEX, FLASH_SPARSE, CUDNN, FLASH_2)
    lines = [line for line in results.lines("forward") if line.case.variant == DECODE]
    return table(lines, columns, scale=1e3)


def missing(results: Results, name: str) -> str:
    """What did not run, with its reason."""
    rows, late = [], []
    for (by, reason), cases in results.missing().items():
        if reason == NOT_REACHED:
            late += cases
            continue
        rows.append(f"- {by}: {shapes(cases)}: {'`' + reason + '`' if ':' in reason else reason}\n")
    if late:
        rows.append(f"- The run ended before these, by number of calls: {shapes(late)}\n")
    return "".join(rows) or "Every case ran.\n"


def shapes(cases: list[Case]) -> str:
    """Shapes and variants of some cases, each with the number of cases."""
    found = Counter(
        f"{case.batch} x {case.length:,}, D {case.head_dim}"
        + (f" {case.variant}" if case.heads != case.key_heads or case.variant == DECODE else "")
        for case in cases
    )
    return "; ".join(f"{name} ({count})" for name, count in found.items())


def table(lines: list[Line], columns: tuple[str, ...], scale: float = 1.0) -> str:
    """Times, with shares of the limit in brackets, the fastest in bold.

    Args:
        lines: of the table.
        columns: implementations.
        scale: of the times, from milliseconds.
    """
    columns = tuple(by for by in columns if any(by in line.times for line in lines))
    headings = ["case", "limit", *(HEADINGS[by] for by in columns)]
    rows = []
    for line in lines:
        best = min(line.times.values())
        cells = [place(line), f"{number(line.limit * scale)} {line.bound[0]}"]
        for by in columns:
            if by not in line.times:
                cells.append("-")
                continue
            time = line.times[by]
            shown = f"{number(time * scale)} ({line.share(by):.0%})"
            cells.append(f"**{shown}**" if time == best else shown)
        rows.append(cells)
    return "\n".join(markdown.table(headings, rows)) + "\n"


def place(line: Line) -> str:
    """Shape and mask of a line."""
    case = line.case
    if case.variant == DECODE:
        return f"{case.mask}, {case.batch} x"
    if _is_multi_head(line):
        return f"{case.batch}, {case.heads}, {case.length:,} {case.mask}"
    bands = "key/value head" if "key/value" in case.mask else "query head"
    shape = f"{case.batch}, {case.length:,}, D {case.head_dim}"
    variant = "prefix of 4" if case.variant == "prefix" else case.variant
    return f"{shape}, {variant}, per {bands}"


def number(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _is_multi_head(line: Line) -> bool:
    return line.case.heads == line.case.key_heads and line.case.variant != DECODE


PARTS: dict[str, Callable[[Results, str], str]] = {
    "run": run,
    "losses": losses,
    "multi-head": multi_head("total"),
    "multi-head-forward": multi_head("forward"),
    "grouped": grouped("total"),
    "grouped-forward": grouped("forward"),
    "decoding": decoding,
    "missing": missing,
}
