"""The gap to dense attention against tokens: a line in the logarithm of tokens, and where it ends.

A bias that helps early can fade. The line `gap = level + slope * log2(tokens / last)` is fitted by
least squares to the validation losses of the last three quarters of the tokens, seed by seed; what
seeds differ by is its uncertainty. Losses of one seed are too correlated to say anything of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import numpy as np

from spattention import markdown
from spattention.choice import STOCK

Entry = dict[str, Any]
FIRST = 0.25  # share of the tokens at which the fit starts
NOT_SEEN = "not in sight"
FARTHEST = 100.0  # times the tokens of the runs, beyond which no line is believed


@dataclass(frozen=True)
class Fit:
    """Lines of all seeds.

    Attributes:
        last: tokens of the runs.
        levels: gap at `last`, in nats, by seed.
        slopes: change of the gap with each doubling of the tokens, by seed.
    """

    last: float
    levels: tuple[float, ...]
    slopes: tuple[float, ...]

    @property
    def level(self) -> float:
        """Mean gap at the last tokens, by the lines."""
        return mean(self.levels)

    @property
    def slope(self) -> float:
        """Mean change of the gap with each doubling."""
        return mean(self.slopes)

    def at(self, tokens: np.ndarray) -> np.ndarray:
        """Gaps of every seed's line, `[seeds, tokens]`."""
        levels, slopes = (np.array(each)[:, None] for each in (self.levels, self.slopes))
        return levels + slopes * np.log2(tokens / self.last)[None]

    def end(self, level: float, slope: float) -> float | None:
        """Tokens at which a line reaches 0; None if it leads away from 0, or ends too far off."""
        if level * slope >= 0:
            return None
        doublings = -level / slope
        return self.last * 2**doublings if doublings <= np.log2(FARTHEST) else None


def gaps(run: Entry, dense: Entry) -> dict[float, float]:
    """Validation loss minus dense's, by millions of tokens."""
    base = {line["step"]: line["eval_loss"] for line in dense["validation"]}
    per_step = run["tokens"] / run["step"]
    return {
        line["step"] * per_step / 1e6: line["eval_loss"] - base[line["step"]]
        for line in run["validation"]
        if line["step"] in base
    }


def fit(label: str, done: Mapping[tuple[str, int], Entry]) -> Fit | None:
    """The lines of a label's seeds that dense attention has too; None with too few losses."""
    seeds = [seed for name, seed in sorted(done) if name == label and (STOCK, seed) in done]
    levels, slopes, last = [], [], 0.0
    for seed in seeds:
        found = gaps(done[label, seed], done[STOCK, seed])
        last = max(found, default=0.0)
        points = [(at, gap) for at, gap in found.items() if at >= FIRST * last]
        if len(points) < 3:
            return None
        x, y = np.array(points).T
        slope, level = np.polyfit(np.log2(x / last), y, 1)
        levels.append(float(level))
        slopes.append(float(slope))
    return Fit(last, tuple(levels), tuple(slopes)) if seeds else None


def table(rows: Sequence[str], done: Mapping[tuple[str, int], Entry]) -> list[str]:
    """Where the gaps of several seeds end, as lines of Markdown; empty if there are none."""
    cells = []
    for label in rows:
        found = fit(label, done) if label != STOCK else None
        if found is None or len(found.levels) < 2:
            continue
        seeds = str(len(found.levels))
        cells.append([label, spread(found.levels), spread(found.slopes), ends(found), seeds])
    if not cells:
        return []
    headings = ["attention", "gap at the end", "for each doubling", "ends at, million tokens"]
    lines = markdown.table([*headings, "seeds"], cells, numbers=True)
    return ["The line of each gap:", "", *lines, ""]


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds, with a sign."""
    found = f"{mean(values):+.4f}"
    return f"{found} ± {stdev(values):.4f}" if len(values) > 1 else found


def ends(found: Fit) -> str:
    """Where the gap ends, with the range of the seeds."""
    middle = found.end(found.level, found.slope)
    each = [found.end(level, slope) for level, slope in zip(found.levels, found.slopes)]
    if middle is None:
        return NOT_SEEN
    if len(each) == 1:
        return f"{middle:,.0f}"
    known = [end for end in each if end is not None] or [middle]
    latest = f"{max(known):,.0f}" if len(known) == len(each) else NOT_SEEN
    return f"{middle:,.0f} ({min(known):,.0f} to {latest})"
