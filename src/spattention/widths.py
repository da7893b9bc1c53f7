"""Edges of bands, by the name of their widths, sizes of local windows, and intervals joined."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

from .scalars import as_int

Interval = tuple[int, int]
Widths = str | Sequence[int]


def band_edges(num_heads: int, span: int, widths: Widths, first: int | None) -> tuple[int, ...]:
    """The H + 1 edges of the bands; head h's band is `[edges[h], edges[h + 1])`. Names as in
    `exclusive`."""
    if first is not None:
        first = integer("first", first)
        if not isinstance(widths, str) or widths != "geometric":
            raise ValueError(f'`first` is only for `widths="geometric"`, got widths={widths!r}')
        if not 1 <= first <= span:
            raise ValueError(f"`first` must be between 1 and `span` = {span}, got {first}")
    if isinstance(widths, str):
        if widths == "uniform":
            width, extra = divmod(span, num_heads)
            return tuple(h * width + min(h, extra) for h in range(num_heads + 1))
        if widths == "geometric":
            return _geometric_edges(num_heads, span, first or max(1, span // 128))
        if widths == "equal_work":
            return tuple(
                round(span * (1 - math.sqrt(1 - h / num_heads))) for h in range(num_heads + 1)
            )
        raise ValueError(
            '`widths` must be "uniform", "geometric", "equal_work" or a sequence of edges, '
            f"got {widths!r}"
        )
    edges = integers("widths", widths)
    if len(edges) != num_heads + 1:
        raise ValueError(
            f"`widths` must hold one edge more than bands = {num_heads + 1} edges, got {len(edges)}"
        )
    if edges[0] != 0 or edges[-1] != span or any(a > b for a, b in zip(edges, edges[1:])):
        raise ValueError(
            f"`widths` as edges must run from 0 to `span` = {span} and never decrease, got {edges}"
        )
    return edges


def _geometric_edges(num_heads: int, span: int, first: int) -> tuple[int, ...]:
    edges = [0]
    for h in range(1, num_heads):
        edge = round(first * (span / first) ** ((h - 1) / (num_heads - 1)))
        edges.append(min(span, max(edges[-1] + 1, edge)))
    return (*edges, span)


def local_windows(
    num_heads: int, span: int, widths: Widths, local: int | Sequence[int] | None, per: str = "head"
) -> tuple[int, ...]:
    if local is None:
        if isinstance(widths, str) and widths == "geometric":
            return (min(span, max(128, span // 32)),) * num_heads
        edges = band_edges(num_heads, span, "uniform", None)
        return tuple(far - near + 1 for near, far in zip(edges, edges[1:]))
    if isinstance(local, Iterable):
        windows = integers("local", local)
        if len(windows) != num_heads:
            raise ValueError(
                f"`local` must be one size or one per {per} ({num_heads}), got {len(windows)}"
            )
    else:
        windows = (integer("local", local),) * num_heads
    if min(windows) < 0:
        raise ValueError(f"`local` must not be negative, got {local}")
    return windows


def merged(intervals: Sequence[Interval], span: int) -> tuple[Interval, ...]:
    """Clipped to `[0, span)`, empty ones dropped, those that overlap or touch joined."""
    joined: list[Interval] = []
    for near, far in sorted((near, min(far, span)) for near, far in intervals):
        if near >= far:
            continue
        if joined and near <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(far, joined[-1][1]))
        else:
            joined.append((near, far))
    return tuple(joined)


def integer(name: str, value: Any) -> int:
    """The value as an int of 64 bits; ValueError, which names the argument, for anything else."""
    found = as_int(value)
    if found is None:
        raise ValueError(f"`{name}` must be an integer, got {reprlib.repr(value)}")
    if found.bit_length() > 63:
        raise ValueError(
            f"`{name}` must fit in 64 bits, got an integer of {found.bit_length() + 1} bits"
        )
    return found


def integers(name: str, values: Any) -> tuple[int, ...]:
    """The values as ints; see `integer`."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"`{name}` must be a sequence of integers, got {reprlib.repr(values)}")
    return tuple(integer(name, value) for value in values)
