"""The picture of a comparison: losses along training, and speed."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..plots import INK
from .summary import Result, Row


def comparison_figure(
    results: Sequence[Result], rows: Sequence[Row], unigram_entropy: float
) -> Figure:
    """Validation loss along training, and loss against work for each way to attend."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=[1.25, 1])
    palette = matplotlib.color_sequences["tab10"]
    colors = {row.attention: palette[k % len(palette)] for k, row in enumerate(rows)}
    named = set()
    for result in results:
        color = colors[result.attention]
        label = None if result.attention in named else result.attention
        named.add(result.attention)
        steps, losses = zip(*result.train_losses) if result.train_losses else ((), ())
        curves.plot(steps, losses, color=color, alpha=0.25, linewidth=1)
        steps, losses = zip(*result.validation_losses)
        curves.plot(steps, losses, "o-", color=color, markersize=4, linewidth=1.6, label=label)
    curves.axhline(unigram_entropy, color=INK, linestyle=":", linewidth=1)
    curves.annotate(
        "unigram entropy of the evaluated windows",
        (0.98, unigram_entropy),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=INK,
    )
    curves.set(xlabel="step", ylabel="loss (nats per token)")
    curves.set_title("loss on validation (dots) and training text (faint)", fontsize=10)
    curves.legend(fontsize=8, frameon=False)
    _draw_speed(bars, rows, colors)
    for axis in (curves, bars):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_speed(axis: Axes, rows: Sequence[Row], colors: dict[str, tuple[float, ...]]) -> None:
    names = [row.attention.replace(":", ":\n") for row in rows]
    speeds = [row.tokens_per_second for row in rows]
    drawn = axis.barh(names, speeds, color=[colors[row.attention] for row in rows], height=0.6)
    texts = [f"{row.tokens_per_second:,.0f}  (loss {row.loss:.3f})" for row in rows]
    axis.bar_label(drawn, labels=texts, fontsize=8, padding=3)
    axis.invert_yaxis()
    axis.set_xlim(0, max(speeds) * 1.5)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_xlabel("training tokens per second")
    axis.tick_params(axis="y", labelsize=8)
    axis.set_title("speed, and the validation loss at the end", fontsize=10)
