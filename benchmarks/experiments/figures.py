"""Plots of a plan's finished runs, `done`: by label and seed, entries of the ledger."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean, median
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from spattention.choice import STOCK

from .gaps import FIRST, Entry, Fit, fit, gaps

AHEAD = 4.0  # times the tokens of the runs, as far as fits are drawn
COMMON = ("dense", "shared_local", "shared_local:widths=geometric", "sliding_window")
TITLES = {
    "tokens": "loss minus dense's against tokens",
    "time": "loss against time",
    "position": "loss minus dense's by position in the context",
}


def seeds_of(label: str, done: dict[tuple[str, int], Entry]) -> list[int]:
    """The seeds that a label was run with."""
    return sorted(seed for name, seed in done if name == label)


def speed(entry: Entry) -> float | None:
    """Tokens per second: what was measured apart (speeds.py), or else of the run, the median of all
    lines but the first, which compiles.

    None for a run that shared its GPU or host with other work, at least for a time.
    """
    if "speed" in entry:
        measured: float | None = entry["speed"]
        return measured
    if entry.get("beside"):
        return None
    found = [line["tokens_per_second"] for line in entry["train"][1:]]
    return median(found) if found else None


def reference_gpu(done: dict[tuple[str, int], Entry]) -> str | None:
    """The GPU whose speeds are shown: that of dense's first seed, or else of the first run."""
    first = next((entry for (label, _), entry in done.items() if label == STOCK), None)
    first = first or next(iter(done.values()), None)
    found: str | None = None if first is None else first["gpu"]
    return found


def curve(entry: Entry) -> list[tuple[float, float]]:
    """(seconds, validation loss), tokens at the run's median speed: compiling, evaluation and
    saving do not count. Empty where no speed is known."""
    rate = speed(entry)
    if rate is None:
        return []
    per_step = entry["tokens"] / entry["step"]
    return [(line["step"] * per_step / rate, line["eval_loss"]) for line in entry["validation"]]


def seconds_to(loss: float, points: Sequence[tuple[float, float]]) -> float | None:
    """When a curve first comes down to a loss, straight between its points; None if never."""
    before: tuple[float, float] | None = None
    for time, value in points:
        if value <= loss:
            if before is None:
                return time
            share = (before[1] - loss) / (before[1] - value)
            return before[0] + share * (time - before[0])
        before = (time, value)
    return None


def styles_of(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """One colour per label; where colours run out, they come again with another line."""
    pairs = matplotlib.color_sequences["tab20"]
    palette = [*pairs[::2], *pairs[1::2]]  # strong colours first, their pale companions last
    lines = ("-", "--", ":")
    return {
        label: {"color": palette[k % 20], "linestyle": lines[k // 20 % len(lines)]}
        for k, label in enumerate(labels)
    }


def _styles(rows: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Styles that are the same in all pictures for attention that several of them show."""
    return styles_of([*COMMON, *(label for label in rows if label not in COMMON)])


def tokens_figure(rows: Sequence[str], done: dict[tuple[str, int], Entry]) -> Figure | None:
    """The gap to dense against tokens, the mean over seeds with each of them behind it, and for
    seeds that differ the line of `gaps.fit` with their standard deviation, `AHEAD` times as far.
    """
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.subplots()
    styles = _styles(rows)
    for label in rows:
        shared = [s for s in seeds_of(label, done) if (STOCK, s) in done]
        if label == STOCK or not shared:
            continue
        each = [gaps(done[label, s], done[STOCK, s]) for s in shared]
        style = styles[label]
        if len(each) > 1:
            for gap in each:
                axis.plot(*zip(*gap.items()), linewidth=0.8, alpha=0.45, **style)
            _draw_fit(axis, fit(label, done), style["color"])
        tokens = [at for at in each[0] if all(at in gap for gap in each)]
        means = [mean(gap[at] for gap in each) for at in tokens]
        axis.plot(tokens, means, marker="o", markersize=3, label=label, **style)
    if not axis.lines:
        return None
    axis.axhline(0.0, color="#333333", linewidth=1)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set(xlabel="million tokens", ylabel="validation loss minus dense's (nats)")
    _finish(axis, TITLES["tokens"])
    return figure


def _draw_fit(axis: Any, found: Fit | None, color: Any) -> None:
    if found is None:
        return
    tokens = np.geomspace(FIRST * found.last, AHEAD * found.last, 50)
    lines = found.at(tokens)
    middle, error = lines.mean(axis=0), lines.std(axis=0, ddof=1)
    axis.plot(tokens, middle, color=color, linewidth=1, linestyle=":")
    axis.fill_between(tokens, middle - error, middle + error, color=color, alpha=0.12, linewidth=0)


def position_figure(rows: Sequence[str], done: dict[tuple[str, int], Entry]) -> Figure | None:
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.subplots()
    styles = _styles(rows)
    for label in rows:
        shared = [s for s in seeds_of(label, done) if (STOCK, s) in done]
        if label == STOCK or not shared:
            continue
        edges = done[label, shared[0]]["final"]["edges"]
        gaps = [
            mean(
                done[label, s]["final"]["by_position"][k]
                - done[STOCK, s]["final"]["by_position"][k]
                for s in shared
            )
            for k in range(len(edges) - 1)
        ]
        axis.stairs(gaps, edges, label=label, baseline=None, **styles[label])
    if not axis.patches:
        return None
    axis.axhline(0.0, color="#333333", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="position in the context (tokens)", ylabel="loss minus dense's (nats)")
    _finish(axis, TITLES["position"])
    return figure


def _finish(axis: Any, title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.figure.legend(fontsize=7, frameon=False, loc="outside right upper")
    axis.spines[["top", "right"]].set_visible(False)


def time_figure(rows: Sequence[str], done: dict[tuple[str, int], Entry]) -> Figure | None:
    """What a given time on the GPU buys; the first validation lies above the picture."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.subplots()
    styles = _styles(rows)
    highest = 0.0
    for label in rows:
        name: str | None = label
        for seed in seeds_of(label, done):
            points = curve(done[label, seed])
            if len(points) < 2 or done[label, seed]["gpu"] != reference_gpu(done):
                continue
            axis.plot(*zip(*points), marker="o", markersize=3, label=name, **styles[label])
            name = None
            highest = max(highest, points[1][1])
    if len(axis.lines) < 2:
        return None
    axis.set_ylim(top=highest)
    axis.set(xlabel="seconds of training steps", ylabel="validation loss (nats)")
    _finish(axis, TITLES["time"])
    return figure
