"""A table of fitted patterns that a person can read: what each layer got, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..bands import BandPattern, Interval
from ..cache_layout import ring_lengths
from .capture import captured
from .fit import FETCHES
from .profile import Profile


@dataclass(frozen=True)
class HeadRow:
    """The intervals that one head got, and why.

    Attributes:
        layer: index of the layer.
        head: index of the query head.
        intervals: distances that it attends.
        pairs: share of dense attention's pairs.
        captured: share of the dense head's attention on the keys that it attends.
        first: share of the dense head's attention on the first tokens.
        distance: distance in tokens within which half of the rest lies.
        needle: share of attention on needles; None if the profile has none.
        minded: how much the loss minds this head, the mean head being 1; None if the profile has no
            sensitivity.
        reason: in words.
    """

    layer: int
    head: int
    intervals: tuple[Interval, ...]
    pairs: float
    captured: float
    first: float
    distance: int
    needle: float | None
    minded: float | None
    reason: str


RESTS = 0.01  # share of what answers mind of their needles from which on a head fetches them


@dataclass(frozen=True)
class Explanation:
    """Fitted patterns beside what was measured.

    Attributes:
        rows: one per layer and head.
        length: tokens for which pairs and cache are counted.
        prefix: first tokens that every head attends.
        pairs: share of dense attention's pairs, all layers.
        captured: mean share of attention captured, all layers and heads.
        cache: share of a dense cache that is kept: per key/value head, what its query heads reach.
    """

    rows: tuple[HeadRow, ...]
    length: int
    prefix: int
    pairs: float
    captured: float
    cache: float

    def layer(self, index: int) -> list[HeadRow]:
        """The rows of one layer."""
        return [row for row in self.rows if row.layer == index]

    def markdown(self) -> str:
        """The table: one line per layer and kind of head."""
        first = f" and the first {self.prefix} tokens" if self.prefix else ""
        lines = [
            f"{self.pairs:.4f} of dense attention's pairs at {self.length:,} tokens, "
            f"{self.captured:.4f} of its attention captured, {self.cache:.3f} of its cache kept.",
            "",
            "| layer | pairs | captured | heads | attend" + first + " | why |",
            "|---|---|---|---|---|---|",
        ]
        for index in sorted({row.layer for row in self.rows}):
            rows = self.layer(index)
            pairs = sum(row.pairs for row in rows) / len(rows)
            share = sum(row.captured for row in rows) / len(rows)
            start = f"| {index} | {pairs:.3f} | {share:.3f} "
            for intervals, same in _grouped(rows).items():
                heads = ", ".join(str(row.head) for row in same)
                why = "; ".join(dict.fromkeys(row.reason for row in same))
                lines.append(f"{start}| {heads} | {_text(intervals)} | {why} |")
                start = "| | | "
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        return self.markdown()


def explain(
    profile: Profile, patterns: Sequence[BandPattern], *, length: int | None = None
) -> Explanation:
    """The table of what each layer and head got of `fit`, or of any patterns, and why.

    Args:
        profile: of the dense model.
        patterns: one per layer.
        length: tokens for which pairs are counted; default the profile's.
    """
    length = profile.length if length is None else length
    shares = captured(profile, patterns)
    dense = length * (length + 1) // 2
    rest = profile.by_distance(profile.prefix_max)
    minded = None if profile.sensitivity is None else profile.sensitivity.sum(dim=-1)
    rows = []
    for layer, pattern in enumerate(patterns):
        whole = all(_is_dense(head, length) for head in pattern.intervals)
        pairs = pattern.pairs(length)
        for head, intervals in enumerate(pattern.intervals):
            median = _median(profile.edges, rest[layer, head])
            first = float(profile.first[layer, head].sum())
            needle = None if profile.needle is None else float(profile.needle[layer, head])
            weight = None if minded is None else _share_of_mean(minded, layer, head)
            asked = profile.needle_sensitivity
            answers = 0.0 if asked is None else float(asked[layer, head])
            reason = _reason(intervals, length, whole, first, median, needle, answers)
            rows.append(
                HeadRow(
                    layer,
                    head,
                    intervals,
                    pairs[head] / dense,
                    float(shares[layer, head]),
                    first,
                    median,
                    needle,
                    weight,
                    reason + _minds(weight),
                )
            )
    return Explanation(
        tuple(rows),
        length,
        max(pattern.prefix for pattern in patterns),
        sum(row.pairs for row in rows) / len(rows),
        float(shares.mean()),
        _cache(patterns, profile.model.kv_heads, length),
    )


def _reason(
    intervals: tuple[Interval, ...],
    length: int,
    whole: bool,
    first: float,
    median: int,
    needle: float | None,
    answers: float,
) -> str:
    if whole:
        return "whole layer"
    if _is_dense(intervals, length):
        if needle is not None and needle >= FETCHES:
            return f"fetches ({needle:.2f} on needles)"
        if answers >= RESTS:
            return f"fetches ({answers:.2f} of what answers mind)"
        return f"looks everywhere (half beyond {median:,})"
    if first >= 0.5:
        return f"rests on the first tokens ({first:.2f})"
    if len(intervals) > 1 or (intervals and intervals[0][0] > 0):
        return f"looks near and at one band (half beyond {median:,})"
    return f"looks near (half within {median:,})"


def _minds(weight: float | None) -> str:
    return "" if weight is None else f", minded {weight:.1f} x the mean"


def _share_of_mean(minded: torch.Tensor, layer: int, head: int) -> float:
    mean = float(minded.mean())
    return float(minded[layer, head]) / mean if mean > 0 else 1.0


def _cache(patterns: Sequence[BandPattern], kv_heads: int, length: int) -> float:
    """Tokens kept per key/value head: as far as the farthest of its query heads looks."""
    kept = sum(
        min(length, reach + (pattern.prefix if reach else 0))
        for pattern in patterns
        for reach in ring_lengths(pattern, kv_heads, max_rollback=0)
    )
    return kept / (len(patterns) * kv_heads * length)


def _median(edges: Sequence[int], shares: torch.Tensor) -> int:
    """The edge of the bins up to which half of the shares lie."""
    total = shares.cumsum(0)
    bin_index = int((total < total[-1] / 2).sum())
    return edges[min(bin_index + 1, len(edges) - 1)]


def _is_dense(intervals: tuple[Interval, ...], length: int) -> bool:
    return len(intervals) == 1 and intervals[0][0] == 0 and intervals[0][1] >= length


def _grouped(rows: Sequence[HeadRow]) -> dict[tuple[Interval, ...], list[HeadRow]]:
    """Heads with the same intervals together; those that attend most first."""
    same: dict[tuple[Interval, ...], list[HeadRow]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (-row.pairs, row.head)):
        same[row.intervals].append(row)
    return same


def _text(intervals: tuple[Interval, ...]) -> str:
    return " and ".join(f"[{near:,}, {far:,})" for near, far in intervals) or "nothing"
