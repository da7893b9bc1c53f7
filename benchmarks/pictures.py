"""Draw the pictures of the README and the docs: a small mask of each pattern, and the speed chart.

python -m benchmarks.pictures
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from spattention.bands import BandPattern
from spattention.plots import FUTURE, UNSEEN, head_colors

from .limits.cases import DENSE, OURS, Case
from .limits.results import ON_MASK, Results, newest

IMAGES = Path(__file__).parent.parent / "docs" / "images"
SPAN, HEADS = 96, 8
PATTERNS = {
    "dense": BandPattern.dense(HEADS, SPAN),
    "sliding_window": BandPattern.sliding_window(HEADS, SPAN, 12),
    "exclusive": BandPattern.exclusive(HEADS, SPAN),
    "exclusive_geometric": BandPattern.exclusive(HEADS, SPAN, widths="geometric", first=3),
    "shared_local_mask": BandPattern.shared_local(HEADS, SPAN, local=6),
    "gapped": BandPattern.gapped(HEADS, SPAN),
    "local_only": BandPattern.local_only(HEADS, SPAN),
}
SHARED = (0.25, 0.25, 0.25)  # pairs that every head attends


def small_mask(pattern: BandPattern) -> np.ndarray:
    """The masks of all heads as one picture `[N, N, 3]`.

    A pair has the colour of the head that attends it, and dark grey where every head does.
    """
    distance = np.arange(SPAN)[:, None] - np.arange(SPAN)
    image = np.empty((SPAN, SPAN, 3))
    image[:] = UNSEEN
    seen_by = np.zeros(distance.shape, dtype=int)
    for color, head in zip(head_colors(HEADS), pattern.intervals):
        for near, far in head:
            seen = (distance >= near) & (distance < far)
            image[seen] = color
            seen_by += seen
    image[seen_by == HEADS] = SHARED
    image[distance < 0] = FUTURE
    return image


def draw_masks() -> None:
    """One square picture of 192 pixels per pattern."""
    for name, pattern in PATTERNS.items():
        figure = Figure(figsize=(1.92, 1.92))
        axis = figure.add_axes((0, 0, 1, 1))
        axis.imshow(small_mask(pattern), interpolation="nearest")
        axis.axis("off")
        figure.savefig(IMAGES / f"mask-{name.removesuffix('_mask')}.png", dpi=100)


def draw_speed(results: Results) -> None:
    """Times faster than the fastest dense kernel, forward + backward: geometric `shared_local` by
    this library, and by the fastest other on the same mask."""
    lines = [
        line
        for line in results.lines("total")
        if line.case.variant == "plain" and line.case.mask == "geometric"
    ]
    lines.sort(key=lambda line: (line.case.length, line.case.batch * line.case.heads))
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axis = figure.add_subplot()
    for shift, color, label, names in (
        (-0.2, "#3f8f5c", "spattention", (OURS,)),
        (0.2, "#b5cfc0", "the fastest other on the same mask", ON_MASK),
    ):
        speedups = [
            min(line.times[by] for by in DENSE if by in line.times)
            / min(line.times[by] for by in names if by in line.times)
            for line in lines
        ]
        bars = axis.bar(np.arange(len(lines)) + shift, speedups, 0.38, color=color, label=label)
        axis.bar_label(bars, [f"{speedup:.1f}" for speedup in speedups], fontsize=8, padding=1)
    axis.axhline(1.0, color="#333333", linewidth=1)
    axis.set_xticks(range(len(lines)), [shape(line.case) for line in lines], fontsize=8)
    axis.set_yscale("log", base=2)
    axis.set_yticks([1, 2, 4, 8], ["1x", "2x", "4x", "8x"])
    axis.set_ylim(0.8, 13)
    axis.set_ylabel("times faster than dense")
    facts = results.environment
    axis.set_title(
        f"{facts['gpu']}, torch {facts['torch']}, Triton {facts['triton']}: geometric "
        "shared_local, forward + backward, bf16",
        fontsize=10,
    )
    axis.legend(frameon=False, fontsize=9, loc="upper left")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.savefig(IMAGES / "speed.png", dpi=150)


def shape(case: Case) -> str:
    """Batch, heads, key/value heads, tokens and head_dim of a case, in three lines."""
    heads = f"{case.heads}/{case.key_heads}" if case.heads != case.key_heads else f"{case.heads}"
    return f"{case.length:,}\nB {case.batch}, H {heads}\nD {case.head_dim}"


if __name__ == "__main__":
    draw_masks()
    file = newest()
    if file is None:
        raise SystemExit("there must be a file of results, benchmarks/results/limits_*.json")
    draw_speed(Results.read(file))
