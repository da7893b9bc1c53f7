"""Pictures of patterns and evaluations."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import MaxNLocator

from .bands import BandPattern

if TYPE_CHECKING:
    from .evaluation.heads import LayerHeads
    from .evaluation.perplexity import LossByPosition
    from .evaluation.recall import Score

UNSEEN = (0.93, 0.93, 0.93)
FUTURE = (1.0, 1.0, 1.0)
INK = "#333333"


def picture_of(
    figure: Figure,
    dots_per_inch: float,
    kind: str = "png",
    metadata: dict[str, Any] | None = None,
) -> bytes:
    """The content of a picture's file, to be written whole; arguments as in `Figure.savefig`."""
    content = io.BytesIO()
    figure.savefig(content, dpi=dots_per_inch, format=kind, metadata=metadata)
    return content.getvalue()


def head_colors(num_heads: int) -> list[tuple[float, float, float]]:
    """One colour per head, from near to far, distinct also in print and to the colour-blind."""
    if num_heads == 1:
        return [to_rgb("#3b6fb6")]
    shades = matplotlib.colormaps["turbo"](np.linspace(0.08, 0.92, num_heads))
    return [(float(r), float(g), float(b)) for r, g, b, _ in shades]


def mask_image(pattern: BandPattern, head: int, length: int, cells: int = 1024) -> np.ndarray:
    """The mask of a head as colours: attended, not attended, and the future.

    Args:
        pattern: the bands.
        head: index of the head.
        length: number of queries and of keys.
        cells: upper bound on the rows of the picture. Up to this length a pixel is one pair; beyond
            it a pixel is a block of pairs, attended where any of them is, so that every band is
            visible.

    Returns:
        `[rows, rows, 3]` in 0..1, rows = `ceil(length / block)`.
    """
    block = -(-length // cells)
    rows = -(-length // block)
    offset = np.arange(rows)[:, None] - np.arange(rows)
    # A block of pairs holds the distances from the corner nearest the diagonal to the farthest.
    least, most = (offset - 1) * block + 1, (offset + 1) * block - 1
    seen = np.zeros((rows, rows), dtype=bool)
    for near, far in pattern.intervals[head]:
        seen |= (least < far) & (most >= near)
    if pattern.intervals[head]:
        seen |= np.arange(rows) * block < pattern.prefix
    image = np.empty((rows, rows, 3))
    image[:] = UNSEEN
    image[offset < 0] = FUTURE
    image[seen & (offset >= 0)] = head_colors(pattern.num_heads)[head]
    return image


def pattern_figure(pattern: BandPattern, length: int | None = None, title: str = "") -> Figure:
    """The mask of every head over `length` queries and keys, by default the span, and below them
    the distances that each head covers. The share of dense attention's pairs follows the title."""
    length = pattern.span if length is None else length
    if length < 1:
        raise ValueError(f"`length` must be at least 1, got {length}")
    heads = pattern.num_heads
    columns, width, height = _grid(heads)
    narrow = columns > 4
    cover = min(4.5, max(1.6, 0.24 * heads + 0.9))
    figure = Figure(figsize=(width, height + cover + 1.0), layout="constrained")
    heights = [height + 0.6, cover]
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    pairs = pattern.pairs(length)
    causal = length * (length + 1) // 2
    total = f"{100 * sum(pairs) / (causal * heads):.1f} % of dense attention's pairs"
    above.suptitle(f"{title or repr(pattern)}: {total}", color=INK, fontsize=11)
    for head, axis in _panels(above, heads):
        _draw_pairs(axis, mask_image(pattern, head, length), length)
        keys, share = _attended_keys(pattern, head), f"{100 * pairs[head] / causal:.1f} %"
        if narrow:  # a band to a line, as wide titles would run into each other
            text = "\n".join([f"head {head}, {share}", *keys])
        else:
            text = f"head {head}: {' '.join(keys)}\n{share} of the pairs"
        axis.set_title(text, fontsize=7 if narrow else 8, color=INK)
    _draw_cover(below.subplots(), pattern)
    return figure


def seen_figure(seen: np.ndarray, title: str) -> Figure:
    """Pairs that each head attends, uint8 `[H, N, N]` as `spattention.baselines.seen` returns them:
    in its colour, and paler where a group of tokens is attended as one. The share of dense
    attention's pairs follows the title."""
    heads, length = seen.shape[:2]
    _, width, height = _grid(heads)
    figure = Figure(figsize=(width, height + 1.0), layout="constrained")
    causal = length * (length + 1) // 2
    share = 100 * np.count_nonzero(seen) / (causal * heads)
    text = f"{title}: reaches {share:.1f} % of dense attention's pairs"
    figure.suptitle(text, color=INK, fontsize=11)
    for head, axis in _panels(figure, heads):
        _draw_pairs(axis, seen_image(seen, head), length)
        part = 100 * np.count_nonzero(seen[head]) / causal
        axis.set_title(f"head {head}: {part:.1f} %", fontsize=8, color=INK)
    return figure


def _grid(heads: int) -> tuple[int, float, float]:
    """Columns of a grid with a square for each head, its width and its height in inches."""
    columns = min(4, heads) if heads <= 16 else 8
    cell = 1.6 if columns > 4 else 2.6
    return columns, max(cell * columns + 0.9, 6.0), -(-heads // columns) * (cell + 0.3)


def _panels(figure: FigureBase, heads: int) -> Iterator[tuple[int, Axes]]:
    """The heads with their squares, which are labelled at the edges of the grid."""
    columns, _, _ = _grid(heads)
    axes = figure.subplots(-(-heads // columns), columns, squeeze=False)
    for head, axis in enumerate(axes.flat):
        if head >= heads:
            axis.set_axis_off()
            continue
        if head % columns == 0:
            axis.set_ylabel("query position", fontsize=8, color=INK)
        if head + columns >= heads:
            axis.set_xlabel("key position", fontsize=8, color=INK)
        yield head, axis


def seen_image(seen: np.ndarray, head: int, cells: int = 1024) -> np.ndarray:
    """The pairs of a head as colours; arguments as in `seen_figure` and `mask_image`."""
    length = seen.shape[1]
    block = -(-length // cells)
    rows = -(-length // block)
    padded = np.pad(seen[head], ((0, rows * block - length),) * 2)
    blocks = padded.reshape(rows, block, rows, block).max(axis=(1, 3))
    image = np.empty((rows, rows, 3))
    image[:] = UNSEEN
    image[np.triu_indices(rows, 1)] = FUTURE
    color = np.array(head_colors(len(seen))[head])
    image[blocks == 1] = color
    image[blocks == 2] = (color + 2 * np.array(FUTURE)) / 3
    return image


def evaluation_figure(
    loss: LossByPosition | None,
    scores: Sequence[Score] | None,
    heads: Sequence[LayerHeads] | None,
    title: str = "",
) -> Figure:
    """Loss by position, accuracy of recall, and the entropy of every head; None leaves one out."""
    parts = [part for part in (loss, scores, heads) if part]
    if not parts:
        raise ValueError("an evaluation must have a part to be drawn, got none")
    figure = Figure(figsize=(5 * len(parts), 4.4), layout="constrained")
    if title:
        figure.suptitle(textwrap.fill(title, 60 * len(parts)), fontsize=11, color=INK)
    axes = iter(figure.subplots(1, len(parts), squeeze=False)[0])
    if loss:
        axis = next(axes)
        low, high = ([p.mean + sign * p.error for p in loss.parts] for sign in (-1, 1))
        axis.stairs([p.mean for p in loss.parts], loss.edges, baseline=None, color="#3b6fb6")
        if all(np.isfinite(high)):
            axis.stairs(
                high,
                loss.edges,
                baseline=low,
                fill=True,
                color="#3b6fb6",
                alpha=0.25,
                label="± one standard error, over windows",
            )
            axis.legend(fontsize=8, frameon=False)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="position in the context (tokens)", ylabel="loss (nats per token)")
        axis.set_title(f"validation loss, {loss.loss.mean:.3f} in all", fontsize=10)
    if scores:
        axis = next(axes)
        _draw_recall(axis, scores)
    if heads:
        axis = next(axes)
        image = axis.imshow([layer.entropy for layer in heads], aspect="auto", cmap="viridis")
        figure.colorbar(image, ax=axis, label="nats")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.set(xlabel="head", ylabel="layer")
        axis.set_title("entropy of attention", fontsize=10)
    return figure


def _draw_recall(axis: Axes, scores: Sequence[Score]) -> None:
    """Every question at its place: tasks side by side, settings from left to right."""
    palette = matplotlib.color_sequences["tab10"]
    tasks = list(dict.fromkeys(score.task for score in scores))
    place, ticks, names = 0, [], []
    for number, task in enumerate(tasks):
        mine = [score for score in scores if score.task == task]
        at = list(range(place, place + len(mine)))
        values = [score.accuracy.mean for score in mine]
        axis.bar(at, values, color=palette[number], label=task)
        errors = [score.accuracy.error if score.accuracy.items > 1 else 0.0 for score in mine]
        axis.errorbar(at, values, errors, fmt="none", color=INK, linewidth=1)
        axis.plot(at, [score.chance for score in mine], "_", color=INK, markersize=9)
        ticks += at
        names += [f"{score.setting:g}" for score in mine]
        place += len(mine) + 1
    axis.set_xticks(ticks, names, rotation=90, fontsize=7)
    axis.set(ylabel="accuracy", ylim=(0, 1.02))
    axis.set_xlabel("tokens back, number of pairs, or depth of the needle", fontsize=8)
    axis.set_title("recall (dashes: chance)", fontsize=10)
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_pairs(axis: Axes, image: np.ndarray, length: int) -> None:
    # Edges between pixels, so that position p spans [p, p + 1) on both axes.
    axis.imshow(
        image,
        interpolation="nearest" if length <= 512 else "auto",
        extent=(0, length, length, 0),
    )
    ticks = [0, length // 2, length] if length > 1 else [0, 1]
    axis.set_xticks(ticks)
    axis.set_yticks(ticks)
    axis.tick_params(labelsize=7, color=INK, labelcolor=INK)
    for spine in axis.spines.values():
        spine.set_color("#bbbbbb")


def _draw_cover(axis: Axes, pattern: BandPattern) -> None:
    """A bar per head and interval over the distances."""
    colors = head_colors(pattern.num_heads)
    for head, intervals in enumerate(pattern.intervals):
        axis.barh(
            [head] * len(intervals),
            [far - near for near, far in intervals],
            left=[near for near, _ in intervals],
            height=0.8,
            color=colors[head],
        )
    heads = pattern.num_heads
    every = 1 if heads <= 16 else -(-heads // 16)
    axis.set(ylim=(heads - 0.5, -0.5), xlim=(0, pattern.span), yticks=range(0, heads, every))
    parts = min(8, pattern.span)
    axis.set_xticks([round(k * pattern.span / parts) for k in range(parts + 1)])
    axis.set_xlabel("distance from query to key (tokens)", fontsize=8, color=INK)
    axis.set_ylabel("head", fontsize=8, color=INK)
    beside = f", beside the first {pattern.prefix} keys" if pattern.prefix else ""
    axis.set_title(f"which head covers which distance{beside}", fontsize=9, color=INK)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def _attended_keys(pattern: BandPattern, head: int) -> list[str]:
    """The prefix and the bands of a head, as texts."""
    bands = [f"[{near}, {far})" for near, far in pattern.intervals[head]]
    prefix = [f"first {pattern.prefix}"] if pattern.prefix and bands else []
    return prefix + bands or ["no keys"]
