"""Pictures of a profile, and of the patterns that were fitted to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from ..bands import BandPattern
from .capture import captured
from .explain import explain
from .fit import FETCHES
from .profile import Profile

INK, BLUE, RED, LINE = "#333333", "#3b6fb6", "#c8553d", "#dddddd"
LABELS = 16  # layers that are numbered at most


def profile_figure(profile: Profile) -> Figure:
    """Heads by layer: where they look, how much lies on the first tokens, who fetches needles; and
    the attention that sliding windows capture.
    """
    figure = Figure(figsize=(13, 9), layout="constrained")
    name = profile.model.name or "a dense model"
    figure.suptitle(
        f"what the heads of {name} attend: {profile.tokens:,} tokens, rows of up to "
        f"{profile.length:,}\nin each map a row is a layer, and a square is one of its heads",
        color=INK,
    )
    axes = figure.subplots(2, 2)
    median = _median_distance(profile)
    _heads(
        axes[0][0],
        median,
        "where they look: distance within which half of the attention lies,\napart from the first "
        "tokens",
        "tokens",
        LogNorm(1, max(2, profile.length)),
        _powers(profile.length),
    )
    _heads(
        axes[0][1],
        profile.first.sum(dim=-1),
        f"share of attention on the first {profile.prefix_max} tokens",
        "share",
        Normalize(0, 1),
    )
    if profile.needle is None:
        axes[1][0].set_axis_off()
        axes[1][0].text(0.5, 0.5, "no needles were planted", ha="center", color=INK)
    else:
        _heads(
            axes[1][0],
            profile.needle,
            f"who fetches: share of attention on needles, from {FETCHES} on a head fetches\n"
            f"(the model repeats {profile.needles_found} of {profile.needles} needles)",
            "share",
            Normalize(0, max(FETCHES, float(profile.needle.max()))),
        )
    _windows(axes[1][1], profile)
    return figure


def fit_figure(profile: Profile, patterns: Sequence[BandPattern]) -> Figure:
    """Heads by layer: the pairs that each got, what it captures, and the distances it attends."""
    table = explain(profile, patterns)
    layers, heads = profile.model.layers, profile.model.heads
    figure = Figure(figsize=(13, max(5.0, 0.28 * layers + 2.5)), layout="constrained")
    figure.suptitle(
        f"fitted to {profile.model.name or 'a dense model'}: {table.pairs:.3f} of the pairs of "
        f"dense attention at {table.length:,} tokens, {table.captured:.3f} of it captured",
        color=INK,
    )
    axes = figure.subplots(1, 3, width_ratios=[1, 1, 1.6])
    pairs = torch.tensor([row.pairs for row in table.rows]).view(layers, heads)
    _heads(axes[0], pairs, "share of dense attention's pairs", "share", Normalize(0, 1))
    shares = captured(profile, patterns)
    _heads(axes[1], shares, "share of the attention captured", "share", Normalize(0, 1))
    _reach(axes[2], patterns, table.length)
    kinds = ((BLUE, "nearest tokens and a band"), (RED, "everything"))
    lines = [Line2D([], [], color=color, label=label) for color, label in kinds]
    figure.legend(handles=lines, fontsize=8, frameon=False, ncols=2, loc="outside lower right")
    return figure


def _median_distance(profile: Profile) -> torch.Tensor:
    rest = profile.by_distance(profile.prefix_max).cumsum(dim=-1)
    beyond = (rest < rest[..., -1:] / 2).sum(dim=-1)
    upper = torch.tensor(profile.edges[1:], dtype=torch.float64)
    return upper[beyond.clamp(max=len(upper) - 1)]


def _powers(length: int) -> list[int]:
    """1, 4, 16 and so on up to a length."""
    return [4**k for k in range(length.bit_length()) if 4**k <= length]


def _tokens(axis: Any, length: int) -> None:
    """Number a logarithmic axis, or that of a bar of colours, by tokens."""
    axis.set_major_locator(FixedLocator(_powers(length)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_minor_locator(NullLocator())


def _heads(
    axis: Any,
    values: torch.Tensor,
    title: str,
    label: str,
    norm: Normalize,
    ticks: Sequence[int] = (),
) -> None:
    image = axis.imshow(values.numpy(), aspect="auto", cmap="viridis", norm=norm)
    bar = axis.figure.colorbar(image, ax=axis, label=label)
    if ticks:
        _tokens(bar.ax.yaxis, ticks[-1])
    axis.set_title(title, fontsize=10, color=INK)
    axis.set(xlabel="head", ylabel="layer")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _windows(axis: Any, profile: Profile) -> None:
    """The attention that a window captures: the mean, and the middle eight tenths of the heads."""
    edges = profile.edges[1:]
    curves = profile.by_distance(profile.prefix_max).cumsum(dim=-1).flatten(0, 1)
    first = profile.first.sum(dim=-1).flatten()[:, None]
    for shares, color, label in (
        (curves, BLUE, "window alone, first tokens apart"),
        (curves + first, RED, f"window and the first {profile.prefix_max} tokens"),
    ):
        low, high = torch.quantile(shares, torch.tensor([0.1, 0.9], dtype=shares.dtype), dim=0)
        axis.fill_between(edges, low, high, color=color, alpha=0.15)
        axis.plot(edges, shares.mean(dim=0), color=color, label=label)
    axis.set_xscale("log", base=2)
    _tokens(axis.xaxis, profile.length)
    axis.set(xlabel="window (tokens)", ylabel="share of attention", ylim=(0, 1.02))
    axis.set_title("what windows capture: mean, and 8 of 10 heads", fontsize=10, color=INK)
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)


def _reach(axis: Any, patterns: Sequence[BandPattern], length: int) -> None:
    """A line per head over the distances that it attends, layer below layer."""
    for layer, pattern in enumerate(patterns):
        for head, intervals in enumerate(pattern.intervals):
            y = layer + (head + 0.5) / pattern.num_heads
            dense = intervals == ((0, pattern.span),)
            for near, far in intervals:
                axis.plot(
                    [max(near, 0.7), min(far, length)],
                    [y, y],
                    color=RED if dense else BLUE,
                    linewidth=1.2,
                    solid_capstyle="butt",
                )
    axis.set_xscale("log", base=2)
    _tokens(axis.xaxis, length)
    axis.set(ylim=(len(patterns), 0), xlim=(0.7, length))
    axis.set(xlabel="distance from query to key (tokens)", ylabel="layer, a line per head")
    axis.hlines(range(1, len(patterns)), 0.7, length, color=LINE, linewidth=0.6, zorder=0)
    numbered = range(0, len(patterns), -(-len(patterns) // LABELS))
    axis.set_yticks([layer + 0.5 for layer in numbered], [str(layer) for layer in numbered])
    prefix = max(pattern.prefix for pattern in patterns)
    beside = f",\nbeside the first {prefix} tokens" if prefix else ""
    axis.set_title(f"distances that each head attends{beside}", fontsize=10, color=INK)
    axis.spines[["top", "right"]].set_visible(False)
