"""One picture: how near each implementation comes to the hardware's limit, case by case."""

from __future__ import annotations

import hashlib
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .cases import (
    ANY_ORDER,
    BANDS,
    DECODE,
    DENSE,
    FLASH_4,
    FLASH_SPARSE,
    FLEX,
    FLEX_FLASH,
    MASKS,
    OURS,
    PAGED,
)
from .results import Line, Results

BARS = {  # implementation: colour and name
    OURS: ("#1f4e99", "spattention"),
    ANY_ORDER: ("#6fa3e0", "spattention, any order"),
    PAGED: ("#6fa3e0", "spattention, paged (decoding)"),
    FLEX: ("#d1702c", "FlexAttention"),
    FLEX_FLASH: ("#eeb27c", "FlexAttention FLASH"),
    FLASH_4: ("#3f8f5c", "FlashAttention-4"),
    FLASH_SPARSE: ("#a0498f", "flash-sparse-attn"),
    DENSE[0]: ("#8a8a8a", "dense, cuDNN"),
    DENSE[1]: ("#c4c4c4", "dense, FlashAttention-2 (packed, decoding)"),
}
WIDTH = 0.86  # of the bars of one case
TITLES = {"shared_local": "shared_local, uniform", "geometric": "shared_local, geometric"}


def source_of(file: Path) -> str:
    """Name and digest of the results that a picture shows; it is stored in the picture."""
    return f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}"


def draw(results: Results, path: Path, source: str) -> None:
    """Draw the picture of a run.

    Args:
        results: of the run.
        path: PNG file.
        source: stored in it.
    """
    panels = panels_of(results)
    figure = Figure(figsize=(13, 3.1 * len(panels) + 1.1), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (title, (lines, labels)) in zip(axes, panels.items()):
        panel(axis, title, lines, labels)
    facts = results.environment
    figure.suptitle(
        f"Share of the hardware's limit on {facts['gpu']} (100 % is the limit; higher is better)\n"
        f"bfloat16, torch {facts['torch']}, Triton {facts['triton']}, {facts['date']}; "
        "x: did not run or was not asked",
        fontsize=13,
    )
    shown = {by for lines, _ in panels.values() for line in lines for by in line.times}
    colors = {name: color for by, (color, name) in BARS.items() if by in shown}
    handles = [
        Axes.bar(axes[0], [0], [0], color=color, label=name) for name, color in colors.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=11, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Source": source, "Software": None})


def panels_of(results: Results) -> dict[str, tuple[list[Line], list[str]]]:
    """Lines and labels of each panel, by its title."""
    both = list(results.lines("total"))
    found = {}
    for mask in MASKS:
        lines = [each for each in both if each.case.mask == mask and each.case.head_dim == 128
                 and each.case.heads == each.case.key_heads]  # fmt: skip
        lines.sort(key=lambda each: (each.case.length, each.case.batch * each.case.heads))
        title = f"{TITLES.get(mask, mask)}: forward + backward, D 128"
        found[title] = (
            lines,
            [f"{c.batch} x {c.heads}\nx {c.length:,}" for c in (line.case for line in lines)],
        )
    variants = {"prefix": "prefix 4"}
    for name, mask in BANDS.items():
        lines = [each for each in both if each.case.mask == mask
                 and each.case.heads != each.case.key_heads]  # fmt: skip
        title = f"32 query and 8 key/value heads, geometric, a band per {name}: forward + backward"
        found[title] = (
            lines,
            [
                f"{variants.get(c.variant, c.variant)}\n{c.batch} x {c.length:,}\nD {c.head_dim}"
                for c in (line.case for line in lines)
            ],
        )
    lines = [each for each in results.lines("forward") if each.case.variant == DECODE]
    found["Decoding: one query of each request over 65,536 tokens"] = (
        lines,
        [
            f"{c.mask}\n{c.batch} request{'s' * (c.batch > 1)}"
            for c in (line.case for line in lines)
        ],
    )
    return {title: each for title, each in found.items() if each[0]}


def panel(axis: Axes, title: str, lines: list[Line], labels: list[str]) -> None:
    """Bars of all cases of one panel."""
    order = [by for by in BARS if any(by in line.times for line in lines)]
    width = WIDTH / len(order)
    for index, by in enumerate(order):
        for center, line in enumerate(lines):
            place = center + (index - (len(order) - 1) / 2) * width
            if by not in line.times:
                axis.text(place, 0.01, "x", ha="center", va="bottom", fontsize=8, color="#777777")
                continue
            share = line.share(by)
            axis.bar(place, share, width * 0.94, color=BARS[by][0])
            axis.text(
                place,
                share + 0.01,
                f"{100 * share:.0f}",
                ha="center",
                va="bottom",
                fontsize=7.5,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
            )
    axis.axhline(1.0, color="#333333", linewidth=1, zorder=0)
    axis.set_xlim(-0.5, len(lines) - 0.5)
    axis.set_ylim(0, 1.12)
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "limit"])
    axis.set_xticks(range(len(lines)), labels, fontsize=9)
    axis.set_title(title, fontsize=11, loc="left")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
