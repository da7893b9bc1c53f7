"""Classes of key/value heads whose cache blocks an engine frees together.

A paged engine frees a block once the *window* of its layer has passed it: a query at position p
reads keys after `p - window`. Heads with short bands need their keys for less long than heads with
long ones. So each attention layer is split into a few classes of key/value heads, each with a
window of its own, the farthest edge of its heads' bands.

The classes of all layers, and of all tensor-parallel ranks, have the same sizes and windows. The
engine then manages one table of blocks per class instead of one per layer and class.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..bands import BandPattern
from ..cache_layout import ring_lengths

MAX_CLASSES = 4


@dataclass(frozen=True)
class HeadClass:
    """Key/value heads of one layer on one rank that share a window.

    Attributes:
        kv_heads: indices of the heads on this rank, increasing.
        window: how long a key stays readable, in tokens. A prefix is kept besides.
    """

    kv_heads: tuple[int, ...]
    window: int


def head_classes(
    patterns: Sequence[BandPattern],
    num_kv_heads: int,
    *,
    ranks: int = 1,
    rank: int = 0,
    uniform_pages: bool = False,
    max_classes: int = MAX_CLASSES,
) -> list[tuple[HeadClass, ...]]:
    """The classes of each layer on this rank, the shortest window first.

    They hold the fewest keys among all ways to cut the sorted heads into at most `max_classes`
    parts. An engine stores every class in pages of one size, so each part has to divide the largest
    one; a class of fewer heads then has longer blocks.

    Args:
        patterns: one per layer with bands, over all query heads of the model.
        num_kv_heads: key/value heads of the model.
        ranks: tensor-parallel ranks; query heads are dealt to them in order.
        rank: this one.
        uniform_pages: other layers keep all heads in one class, so each part also has to divide the
            number of heads on a rank.
        max_classes: upper bound; 1 gives one window for all heads.
    """
    here = max(1, num_kv_heads // ranks)
    reaches = {
        (layer, r): kv_reaches(rank_pattern(pattern, ranks, r), here)
        for layer, pattern in enumerate(patterns)
        for r in range(ranks)
    }
    in_order = [sorted(edges) for edges in reaches.values()]
    windows = [max(column) for column in zip(*in_order)]
    sizes = _best_sizes(windows, here if uniform_pages else 0, max_classes)
    classes = []
    for layer in range(len(patterns)):
        edges = reaches[layer, rank]
        order = sorted(range(here), key=lambda head: (edges[head], head))
        parts, start = [], 0
        for size in sizes:
            stop = start + size
            parts.append(HeadClass(tuple(sorted(order[start:stop])), windows[stop - 1]))
            start = stop
        classes.append(tuple(parts))
    return classes


def described(
    patterns: Sequence[BandPattern], classes: Sequence[HeadClass], num_layers: int
) -> str:
    """A line for an engine's log: which layers have bands, and how far their heads read.

    Args:
        patterns: one per layer with bands.
        classes: those of one of these layers.
        num_layers: layers of the model.
    """
    one = len(set(patterns)) == 1 and patterns[0].constructor is not None
    named = repr(patterns[0]) if one else f"{len(set(patterns))} different patterns"
    reads = ", ".join(f"{len(part.kv_heads)} up to {part.window:,}" for part in classes)
    prefix = max(pattern.prefix for pattern in patterns)
    return (
        f"bands in {len(patterns)} of {num_layers} layers: {named}, farthest edge "
        f"{classes[-1].window:,} tokens; key/value heads of a rank by how far back they read: "
        f"{reads} tokens" + (f", and all the first {prefix}" if prefix else "")
    )


def rank_pattern(pattern: BandPattern, ranks: int, rank: int) -> BandPattern:
    """The bands of the query heads that a tensor-parallel rank holds."""
    here = pattern.num_heads // ranks
    return pattern if ranks == 1 else pattern.heads(rank * here, (rank + 1) * here)


def select_heads(pattern: BandPattern, heads: list[int]) -> BandPattern:
    """The bands of some heads, in the order given."""
    if heads == list(range(pattern.num_heads)):
        return pattern
    intervals = tuple(pattern.intervals[head] for head in heads)
    return replace(pattern, intervals=intervals, constructor=None)


def kv_reaches(pattern: BandPattern, num_kv_heads: int) -> list[int]:
    """Per key/value head, the farthest edge of its query heads' bands, at least 1."""
    return [max(reach, 1) for reach in ring_lengths(pattern, num_kv_heads, max_rollback=0)]


def _best_sizes(windows: Sequence[int], multiple: int, max_classes: int) -> tuple[int, ...]:
    """Sizes of the parts of increasing `windows` that hold the fewest keys; of those the fewest
    parts.
    """

    def cost(sizes: tuple[int, ...]) -> tuple[int, int]:
        keys, start = 0, 0
        for size in sizes:
            start += size
            keys += size * windows[start - 1]
        return keys, len(sizes)

    valid = (
        sizes
        for sizes in _compositions(len(windows), max_classes)
        if all((multiple or max(sizes)) % size == 0 for size in sizes)
    )
    return min(valid, key=cost)


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `total` as an ordered sum of at most `parts` positive numbers."""
    yield (total,)
    if parts > 1:
        for first in range(1, total):
            for rest in _compositions(total - first, parts - 1):
                yield (first, *rest)
