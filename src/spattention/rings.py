"""Where the rings of a `BandStore` lie, and which of its heads are handled together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .bands import BandPattern

SLACK = 16


class Rings(NamedTuple):
    """Some key/value heads, none of them empty; `shortest` is the length of their shortest ring."""

    heads: Tensor  # [C]
    offset: Tensor  # [C]
    length: Tensor  # [C]
    shortest: int


class Reach(NamedTuple):
    """Key/value heads of one reach, with the query heads of their groups."""

    reach: int
    key_heads: Tensor  # [C]
    query_heads: Tensor  # [C * group]
    offset: Tensor  # [C]
    length: Tensor  # [C]
    pattern: BandPattern  # of those query heads


class Width(NamedTuple):
    """Query heads that see equally many distances: `near + k`, and `jump` more from `split` on."""

    width: int
    heads: Tensor  # [C]
    offset: Tensor  # [C], of the ring that the head reads
    length: Tensor  # [C]
    near: Tensor  # [C]
    split: Tensor  # [C]
    jump: Tensor  # [C]


class RingTables(NamedTuple):
    """What a store looks up; built once, on its device."""

    offsets: Tensor  # [Hkv], first slot of each head's ring
    lengths: Tensor  # [Hkv], slots of each head's ring
    live: Rings  # all heads that have a ring
    by_length: tuple[Rings, ...]  # the same, rings of one length together
    reaches: tuple[Reach, ...]
    widths: tuple[Width, ...]


def ring_lengths(
    pattern: BandPattern, num_key_heads: int, *, slack: int = SLACK
) -> tuple[int, ...]:
    """Slots that a `BandStore` keeps for each key/value head: the farthest reach of its group plus
    the slack, 0 if the group sees nothing. A dense cache keeps one per token.

    Args:
        pattern: the bands, one entry per query head.
        num_key_heads: key/value heads, a divisor of the pattern's heads.
        slack: as in `BandStore`.

    Raises:
        ValueError: if an argument breaks a rule above.
    """
    if not isinstance(pattern, BandPattern):
        raise ValueError(f"`pattern` must be a BandPattern, got {type(pattern).__name__}")
    heads = pattern.num_heads
    if num_key_heads < 1 or heads % num_key_heads:
        raise ValueError(
            f"`num_key_heads` must divide the pattern's {heads} heads, got {num_key_heads}"
        )
    if slack < 0:
        raise ValueError(f"`slack` must not be negative, got {slack}")
    group = heads // num_key_heads
    farthest = [head[-1][1] if head else 0 for head in pattern.intervals]
    reaches = [max(farthest[h * group : (h + 1) * group]) for h in range(num_key_heads)]
    return tuple(reach + slack if reach else 0 for reach in reaches)


def ring_tables(
    pattern: BandPattern,
    num_key_heads: int,
    *,
    slack: int = SLACK,
    device: torch.device | str | None = None,
) -> RingTables:
    """The tables of a store of these arguments, as in `ring_lengths`, on `device`."""
    lengths = ring_lengths(pattern, num_key_heads, slack=slack)
    offsets = [sum(lengths[:h]) for h in range(len(lengths))]
    bands = pattern.intervals
    group = pattern.num_heads // num_key_heads

    def index(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=device)

    def rings(heads: list[int]) -> Rings:
        return Rings(
            index(heads),
            index([offsets[h] for h in heads]),
            index([lengths[h] for h in heads]),
            min((lengths[h] for h in heads), default=0),
        )

    def reach(heads: list[int]) -> Reach:
        queries = [h * group + g for h in heads for g in range(group)]
        return Reach(
            max(0, lengths[heads[0]] - slack),
            index(heads),
            index(queries),
            index([offsets[h] for h in heads]),
            index([lengths[h] for h in heads]),
            BandPattern(tuple(bands[h] for h in queries), pattern.span),
        )

    def width(distances: int, heads: list[int]) -> Width:
        return Width(
            distances,
            index(heads),
            index([offsets[h // group] for h in heads]),
            index([lengths[h // group] for h in heads]),
            index([bands[h][0][0] for h in heads]),
            index([bands[h][0][1] - bands[h][0][0] for h in heads]),
            index([bands[h][-1][0] - bands[h][0][1] if len(bands[h]) > 1 else 0 for h in heads]),
        )

    alike = [[h for h in range(len(lengths)) if lengths[h] == n] for n in sorted({*lengths})]
    widths = [sum(far - near for near, far in head) for head in bands]
    return RingTables(
        index(offsets),
        index(list(lengths)),
        rings([h for h, length in enumerate(lengths) if length]),
        tuple(rings(heads) for heads in alike if lengths[heads[0]]),
        tuple(reach(heads) for heads in alike),
        tuple(
            width(n, [h for h in range(len(bands)) if widths[h] == n])
            for n in sorted({*widths} - {0})
        ),
    )
