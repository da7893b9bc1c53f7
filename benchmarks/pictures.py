"""Draw the pictures of the README and the docs: a small mask of each pattern, and the speed chart.

python -m benchmarks.pictures benchmarks/results/attention_kept_h200_2026-11-26.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from spattention.bands import BandPattern
from spattention.plots import FUTURE, UNSEEN, head_colors

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
MASKS = {
    "exclusive": "exclusive",
    "shared_local": "shared local",
    "shared_local geometric": "shared local, geometric",
}


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


def draw_speed(results: Path) -> None:
    """Times faster than dense cuDNN attention, forward + backward, case by case."""
    record = json.loads(results.read_text())
    rows = [row for row in record["rows"] if row["over_dense"] is not None]
    cases = list(dict.fromkeys((row["batch"], row["heads"], row["length"]) for row in rows))
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axis = figure.add_subplot()
    width = 0.26
    colors = ("#3b6fb6", "#d1702c", "#3f8f5c")
    for shift, (mask, label) in enumerate(MASKS.items()):
        for by, alpha in (("spattention", 1.0), ("FlexAttention", 0.35)):
            found = {
                (row["batch"], row["heads"], row["length"]): row["over_dense"]
                for row in rows
                if row["mask"] == mask and row["by"] == by
            }
            places = np.arange(len(cases)) + (shift - 1) * width
            axis.bar(
                places + (0.04 if by == "FlexAttention" else -0.04),
                [found[case] for case in cases],
                width * 0.62,
                color=colors[shift],
                alpha=alpha,
                label=f"{label}" if by == "spattention" else None,
            )
    axis.axhline(1.0, color="#333333", linewidth=1)
    axis.set_xticks(range(len(cases)), [f"{b} x {h} x {n:,}" for b, h, n in cases])
    axis.set_yscale("log", base=2)
    axis.set_yticks([1, 2, 4, 8, 16], ["1x", "2x", "4x", "8x", "16x"])
    axis.set_xlabel("batch x heads x tokens")
    axis.set_ylabel("times faster than dense cuDNN")
    environment = record["environment"]
    axis.set_title(
        f"{environment['gpu']}, forward + backward, bf16 (pale: FlexAttention, same mask)",
        fontsize=10,
    )
    axis.legend(frameon=False, fontsize=9)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.savefig(IMAGES / "speed.png", dpi=150)


if __name__ == "__main__":
    draw_masks()
    draw_speed(Path(sys.argv[1]))
