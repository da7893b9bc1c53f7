"""The layout of a `BandStore`: where the ring of each key/value head is, and which heads are
computed together.

A key/value head keeps the newest `reach + max_rollback` tokens in a ring. Its reach is the farthest
distance that a query head of its group attends. The token at position p is in slot `p % length`.
The rings of all heads follow each other in one buffer, then the prefix of each head that has a
ring, and a slot of zeros closes it:

    rings of head 0, 1, 2 (reaches nothing)   prefixes of head 0, 1   zeros
    [. . . .] [. . . . . . . . .]             [. .] [. .]             [0]

While the text is shorter than the span, a store may have a capacity. Its rings are then no longer
than `capacity + max_rollback`, and bands and prefix end at the capacity.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .bands import BandPattern
from .scalars import LARGEST_SIZE, as_int, shown_number

MAX_ROLLBACK = 32  # above the 20 tokens that Transformers drafts at once by default
MOST_BYTES = 2**62  # of a tensor, near PyTorch's limit
ALIGNED = 8  # numbers that tables start at multiples of, as tensors of their own would
UNSET: Any = object()  # for arguments for which None is an error


class HeadGroup(NamedTuple):
    """Rings of key/value heads that are read or written together."""

    heads: Tensor  # [C], key/value heads
    offset: Tensor  # [C], first slot of each ring
    length: Tensor  # [C], slots of each ring
    prefix: Tensor  # [C], first slot of each prefix
    shortest: int  # of the lengths

    @classmethod
    def of(cls, heads: Sequence[int], rings: Rings) -> HeadGroup:
        return cls(
            rings.index(heads),
            rings.index(rings.offsets[h] for h in heads),
            rings.index(rings.lengths[h] for h in heads),
            rings.index(rings.prefixes[h] for h in heads),
            min((rings.lengths[h] for h in heads), default=0),
        )


class SameReach(NamedTuple):
    """Key/value heads of equal reach, with the query heads of their groups."""

    reach: int  # tokens, 0 for heads that no query attends
    rings: HeadGroup
    query_heads: Tensor  # [C * group]
    pattern: BandPattern  # of these query heads

    @classmethod
    def of(cls, heads: Sequence[int], pattern: BandPattern, rings: Rings) -> SameReach:
        queries = [h * rings.group + g for h in heads for g in range(rings.group)]
        bands = tuple(pattern.intervals[h] for h in queries)
        return cls(
            max(0, rings.lengths[heads[0]] - rings.max_rollback),
            HeadGroup.of(heads, rings),
            rings.index(queries),
            BandPattern(bands, pattern.span, prefix=pattern.prefix),
        )


class SameWidth(NamedTuple):
    """Query heads that attend the same number of distances. Step s of a head is at distance
    `near + s`, and `jump` further from step `split` on:

        distance   0 . . 3 4 5 . . . 9 10         intervals [3, 6) and [9, 11)
        step             0 1 2       3  4         near 3, split 3, jump 3, width 5
    """

    width: int
    rings: HeadGroup  # the ring that each head reads
    query_heads: Tensor  # [C]
    near: Tensor  # [C]
    split: Tensor  # [C]
    jump: Tensor  # [C]

    @classmethod
    def of(cls, width: int, heads: Sequence[int], pattern: BandPattern, rings: Rings) -> SameWidth:
        bands = [pattern.intervals[h] for h in heads]
        return cls(
            width,
            HeadGroup.of([h // rings.group for h in heads], rings),
            rings.index(heads),
            rings.index(head[0][0] for head in bands),
            rings.index(head[0][1] - head[0][0] for head in bands),
            rings.index(head[-1][0] - head[0][1] if len(head) > 1 else 0 for head in bands),
        )


@dataclass(frozen=True)
class Rings:
    """Sizes that the groups above are made from, on the host."""

    lengths: tuple[int, ...]  # [Hkv], slots of each head's ring
    max_rollback: int
    group: int  # query heads for each key/value head
    prefix: int  # slots of each prefix

    @property
    def offsets(self) -> tuple[int, ...]:
        """First slot of each head's ring."""
        return tuple(sum(self.lengths[:h]) for h in range(len(self.lengths)))

    @property
    def prefixes(self) -> tuple[int, ...]:
        """First slot of each head's prefix; a head without a ring has none."""
        live = [self.prefix if length else 0 for length in self.lengths]
        return tuple(sum(self.lengths) + sum(live[:h]) for h in range(len(live)))

    def index(self, numbers: Any) -> Tensor:
        return torch.tensor(list(numbers), dtype=torch.int64, device="cpu")


class RingLayout(NamedTuple):
    """Tables that a store looks up, made once, on its device.

    Attributes:
        pattern: the bands and the prefix, as far as the capacity.
        ring_lengths: slots of each key/value head's ring, on the host.
        slots: of all rings and prefixes; the index of the slot of zeros.
        offsets: int64 `[Hkv]`, first slot of each ring.
        lengths: int64 `[Hkv]`, slots of each ring.
        all_heads: all key/value heads.
        live: all heads that have a ring.
        by_length: the same heads, those with equally long rings together.
        by_reach: all key/value heads, those of equal reach together.
        by_width: all query heads that attend anything, those of equal width together.
    """

    pattern: BandPattern
    ring_lengths: tuple[int, ...]
    slots: int
    offsets: Tensor
    lengths: Tensor
    all_heads: HeadGroup
    live: HeadGroup
    by_length: tuple[HeadGroup, ...]
    by_reach: tuple[SameReach, ...]
    by_width: tuple[SameWidth, ...]


def ring_lengths(
    pattern: BandPattern,
    num_key_heads: int,
    *,
    max_rollback: int = MAX_ROLLBACK,
    slack: int = UNSET,
    capacity: int | None = None,
) -> tuple[int, ...]:
    """Slots that a `BandStore` keeps for each key/value head: the farthest reach of its group plus
    the rollback, 0 if the group attends nothing. A dense cache keeps one slot for each token. Each
    head that attends anything has `pattern.prefix` slots besides.

    Args:
        pattern: the bands, one entry per query head.
        num_key_heads: number of key/value heads, a divisor of the pattern's heads.
        max_rollback: as in `BandStore`; `slack` is its former name.
        capacity: as in `BandStore`.

    Raises:
        ValueError: if an argument breaks a rule above.
    """
    if not isinstance(pattern, BandPattern):
        raise ValueError(f"`pattern` must be a BandPattern, got {type(pattern).__name__}")
    num_key_heads = checked_int("num_key_heads", num_key_heads, at_least=1)
    heads = pattern.num_heads
    if heads % num_key_heads:
        raise ValueError(
            f"`num_key_heads` must divide the pattern's {heads} heads, got {num_key_heads}"
        )
    max_rollback = rollback(max_rollback, slack)
    if capacity is not None:
        capacity = checked_int("capacity", capacity, at_least=1)
    group = heads // num_key_heads
    farthest = [head[-1][1] if head else 0 for head in pattern.intervals]
    reaches = [max(farthest[h * group : (h + 1) * group]) for h in range(num_key_heads)]
    if capacity is not None:
        reaches = [min(reach, capacity) for reach in reaches]
    return tuple(reach + max_rollback if reach else 0 for reach in reaches)


def ring_layout(
    pattern: BandPattern,
    num_key_heads: int,
    *,
    max_rollback: int = MAX_ROLLBACK,
    capacity: int | None = None,
    device: torch.device | None = None,
) -> RingLayout:
    """The layout of a store of these arguments, as in `ring_lengths`, on `device`."""
    lengths = ring_lengths(pattern, num_key_heads, max_rollback=max_rollback, capacity=capacity)
    pattern = pattern if capacity is None else _as_far_as(capacity, pattern)
    group = pattern.num_heads // num_key_heads
    rings = Rings(lengths, max_rollback, group, pattern.prefix)
    widths = [sum(far - near for near, far in head) for head in pattern.intervals]
    same_length = [[h for h, n in enumerate(lengths) if n == size] for size in sorted({*lengths})]
    same_width = {n: [h for h, w in enumerate(widths) if w == n] for n in sorted({*widths} - {0})}
    layout = RingLayout(
        pattern=pattern,
        ring_lengths=lengths,
        slots=sum(lengths) + pattern.prefix * sum(map(bool, lengths)),
        offsets=rings.index(rings.offsets),
        lengths=rings.index(lengths),
        all_heads=HeadGroup.of(range(num_key_heads), rings),
        live=HeadGroup.of([h for h, n in enumerate(lengths) if n], rings),
        by_length=tuple(HeadGroup.of(heads, rings) for heads in same_length if lengths[heads[0]]),
        by_reach=tuple(SameReach.of(heads, pattern, rings) for heads in same_length),
        by_width=tuple(SameWidth.of(n, heads, pattern, rings) for n, heads in same_width.items()),
    )
    return _on_device(layout, torch.empty(0, device=device).device)


def _on_device(layout: RingLayout, device: torch.device) -> RingLayout:
    """The layout with its tables on a device. They travel together: each copy waits for a GPU."""
    if device.type == "cpu":
        return layout
    tables: list[Tensor] = []

    def note(table: Tensor) -> Tensor:
        tables.append(table)
        return table

    _map_tables(layout, note)
    sizes = [-(-len(table) // ALIGNED) * ALIGNED for table in tables]
    padded = [pad(table, (0, size - len(table))) for table, size in zip(tables, sizes)]
    parts = iter(torch.cat(padded).to(device).split(sizes))
    found: RingLayout = _map_tables(layout, lambda table: next(parts)[: len(table)])
    return found


def _map_tables(node: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest of tuples with every tensor changed, in order."""
    if isinstance(node, Tensor):
        return change(node)
    if not isinstance(node, tuple):
        return node
    parts = [_map_tables(each, change) for each in node]
    return type(node)(*parts) if hasattr(node, "_fields") else tuple(parts)


def rollback(max_rollback: int, slack: int = UNSET) -> int:
    """`max_rollback`, or what was given under its former name; raises `ValueError`."""
    name = "max_rollback" if slack is UNSET else "slack"
    if slack is not UNSET:
        if max_rollback != MAX_ROLLBACK:
            raise ValueError(
                "`slack` is the former name of `max_rollback`: give one of them, got both"
            )
        max_rollback = slack
    return checked_int(name, max_rollback, at_least=0)


def checked_int(name: str, value: Any, at_least: int) -> Any:
    """The value as an int from `at_least` to `LARGEST_SIZE`; raises `ValueError`."""
    found = value if isinstance(value, torch.SymInt) else as_int(value)
    if found is None:
        raise ValueError(f"`{name}` must be an int, got {value!r}")
    if found < at_least:
        limit = f"be at least {at_least}" if at_least else "not be negative"
        raise ValueError(f"`{name}` must {limit}, got {shown_number(found)}")
    if found > LARGEST_SIZE:
        raise ValueError(f"`{name}` must be at most {LARGEST_SIZE}, got {shown_number(found)}")
    return found


def check_memory(
    layout: RingLayout, device: torch.device, batch: int, max_rollback: int, token_bytes: int
) -> None:
    """Refuse what cannot be there before asking for it: systems hand out memory that they do not
    have. `token_bytes` are those of a key and a value."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    elif device.type == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        memory = MOST_BYTES
    # Of each sequence: its rings and prefixes, and int64 counts, padding and documents.
    size = batch * ((layout.slots + 1) * token_bytes + 8 * (2 * max_rollback + 6))
    if size > memory:
        raise ValueError(
            f"`pattern` must fit into the {memory / 2**30:,.0f} GiB of {device} for {batch} "
            f"sequences with `max_rollback` = {max_rollback}, got rings of up to "
            f"{max(layout.ring_lengths):,} tokens, {size / 2**30:,.0f} GiB: give a `capacity`, "
            "from which the store grows with the text"
        )


def as_device(device: Any) -> torch.device | None:
    """The device, None for PyTorch's default; raises `ValueError`."""
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"`device` must be a device that PyTorch knows, got {device!r}") from error


def tokens_in_reach(pattern: BandPattern) -> int:
    """Tokens that a sequence must have before a store needs all of its room."""
    return max([pattern.prefix, *(far for head in pattern.intervals for _, far in head)])


def capacity_needed(capacity: int | None, pattern: BandPattern) -> int | None:
    """None once the bands reach no farther than the capacity."""
    return None if capacity is None or capacity >= tokens_in_reach(pattern) else capacity


def _as_far_as(capacity: int, pattern: BandPattern) -> BandPattern:
    """The pattern's distances and prefix below `capacity`."""
    bands = tuple(
        tuple((near, min(far, capacity)) for near, far in head if near < capacity)
        for head in pattern.intervals
    )
    prefix = min(pattern.prefix, capacity)
    if prefix:  # a head that reaches nothing so far sees it: a distance of `capacity` is never met
        beyond = ((capacity, capacity + 1),)
        bands = tuple(
            near or (beyond if head else ()) for near, head in zip(bands, pattern.intervals)
        )
    if (bands, prefix) == (pattern.intervals, pattern.prefix):
        return pattern
    return BandPattern(bands, pattern.span, prefix=prefix)
