"""The layout of a sequence over ranks: which positions each rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..scalars import int_at_least

Range = tuple[int, int]
MOST_RANKS = 2**16


@dataclass(frozen=True)
class Shards:
    """Ranges of positions per rank; together they cover `[0, length)` once.

    A worked layout: `Shards.balanced(length=16, ranks=2)`; the digit is the rank.

        0 0 0 0 1 1 1 1 1 1 1 1 0 0 0 0

    Args:
        ranges: per rank, half-open ranges `(start, stop)` of positions, sorted and apart. `()` is a
            rank without tokens. A rank holds the tokens of its ranges one after another.

    Raises:
        ValueError: if ranges are empty, overlap or leave a position out.
    """

    ranges: tuple[tuple[Range, ...], ...]

    def __post_init__(self) -> None:
        merged = tuple(_joined(each) for each in self.ranges)
        if not merged:
            raise ValueError("`ranges` must hold at least one rank, got none")
        end = 0
        for start, stop in sorted(each for rank in merged for each in rank):
            if start != end or stop <= start:
                raise ValueError(
                    f"`ranges` must cover every position once, got [{start}, {stop}) where a range "
                    f"must start at {end}"
                )
            end = stop
        object.__setattr__(self, "ranges", merged)

    @classmethod
    def contiguous(cls, length: int, ranks: int, *, sizes: Sequence[int] | None = None) -> Shards:
        """Consecutive parts, as equal as they can be, or of the given sizes.

        Args:
            length: number of tokens.
            ranks: number of ranks.
            sizes: tokens per rank, which add up to `length`; 0 is allowed.
        """
        length, ranks = (
            int_at_least("length", length, 0),
            int_at_least("ranks", ranks, 1, MOST_RANKS),
        )
        if sizes is None:
            edges = [length * rank // ranks for rank in range(ranks + 1)]
        else:
            if len(sizes) != ranks or sum(sizes) != length or min(sizes) < 0:
                raise ValueError(
                    f"`sizes` must be {ranks} numbers of tokens that add up to `length` = "
                    f"{length}, got {tuple(sizes)}"
                )
            edges = [sum(sizes[:rank]) for rank in range(ranks + 1)]
        return cls(tuple(_nonempty([(edges[r], edges[r + 1])]) for r in range(ranks)))

    @classmethod
    def balanced(cls, length: int, ranks: int) -> Shards:
        """Head and tail: of `2 * ranks` parts, rank r has part r and part `2 * ranks - 1 - r`.

        Causal attention has more pairs at later positions. Here ranks have about equal numbers of
        pairs and, to one or two tokens, of tokens.
        """
        length, ranks = (
            int_at_least("length", length, 0),
            int_at_least("ranks", ranks, 1, MOST_RANKS),
        )
        parts = 2 * ranks
        edges = [length * part // parts for part in range(parts + 1)]
        part = [(edges[i], edges[i + 1]) for i in range(parts)]
        return cls(tuple(_nonempty([part[r], part[parts - 1 - r]]) for r in range(ranks)))

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.ranges)

    @property
    def length(self) -> int:
        """Number of positions of all ranks."""
        return sum(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of tokens per rank."""
        return tuple(sum(stop - start for start, stop in rank) for rank in self.ranges)

    def positions(self, rank: int, device: torch.device | str | None = None) -> torch.Tensor:
        """int64 `[tokens of the rank]`: the position of each of its tokens."""
        parts = [torch.arange(start, stop, device=device) for start, stop in self.ranges[rank]]
        return torch.cat([torch.arange(0, device=device), *parts])

    def split(self, tensor: torch.Tensor, rank: int, dim: int = 1) -> torch.Tensor:
        """The part of a rank of a tensor with a token per position along `dim`, a copy."""
        if tensor.shape[dim] != self.length:
            raise ValueError(
                f"`tensor` must have {self.length} tokens along dimension {dim}, got "
                f"{tensor.shape[dim]}"
            )
        parts = [tensor.narrow(dim, start, stop - start) for start, stop in self.ranges[rank]]
        return torch.cat(parts, dim) if parts else tensor.narrow(dim, 0, 0).clone()

    def join(self, parts: Sequence[torch.Tensor], dim: int = 1) -> torch.Tensor:
        """The whole tensor from the parts of all ranks; undoes `split`."""
        order = torch.cat([self.positions(rank) for rank in range(self.ranks)]).argsort()
        whole = torch.cat(list(parts), dim)
        return whole.index_select(dim, order.to(whole.device))


def intersect(a: Range, b: Range) -> Range | None:
    """Positions of both ranges; None if there are none."""
    start, stop = max(a[0], b[0]), min(a[1], b[1])
    return (start, stop) if start < stop else None


def union(ranges: Sequence[Range]) -> list[Range]:
    """Sorted ranges apart, of the same positions; empty ranges are dropped."""
    found: list[Range] = []
    for start, stop in sorted(each for each in ranges if each[0] < each[1]):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], stop)
        else:
            found.append((start, stop))
    return found


def subtract(ranges: Sequence[Range], others: Sequence[Range]) -> list[Range]:
    """Positions of `ranges` that are in none of `others`, as sorted ranges apart."""
    left = union(ranges)
    for start, stop in others:
        left = [
            piece
            for each in left
            for piece in ((each[0], min(each[1], start)), (max(each[0], stop), each[1]))
            if piece[0] < piece[1]
        ]
    return left


def _joined(ranges: Sequence[Range]) -> tuple[Range, ...]:
    """Ranges of one rank, those that touch joined into one."""
    found: list[Range] = []
    for start, stop in ranges:
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], stop
        else:
            found.append((start, stop))
    if found != sorted(found):
        raise ValueError(f"`ranges` of a rank must be sorted, got {tuple(ranges)}")
    return tuple(found)


def _nonempty(ranges: Sequence[Range]) -> tuple[Range, ...]:
    return tuple(each for each in ranges if each[0] < each[1])
