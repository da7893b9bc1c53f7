"""One exchange of keys and values among ranks, and its reverse for their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..impl.layout import lse_dtype
from .agreement import Group
from .pieces import Piece, Placed, RankPlan, Table
from .plan import Plan


class Pair(NamedTuple):
    """Keys and values `[entries, heads, tokens, D]`, or their gradients."""

    key: Tensor
    value: Tensor


Received = list[list[tuple[Piece, Pair]]]  # per other rank


class Pending:
    """A flat exchange that is under way.

    Args:
        sent: elements to send, held until the exchange is over.
        received: elements that arrive.
        wait: makes what follows wait for the exchange; None if nothing travels.
    """

    def __init__(self, sent: Tensor, received: Tensor, wait: Callable[[], object] | None) -> None:
        self.sent, self.received, self._wait = sent, received, wait

    def wait(self) -> Tensor:
        """The received elements. On a GPU the current stream waits, not the host."""
        if self._wait is not None:
            self._wait()
        return self.received


class Exchange:
    """The exchange of a plan, seen from one rank, for keys and values of one size.

    Args:
        plan: the plan.
        rank: this rank.
        key: `[B, G, tokens, D]` of this rank; value `[B, G, tokens, Dv]` alike.
        group: the ranks.
    """

    def __init__(self, plan: Plan, rank: RankPlan, key: Tensor, value: Tensor, group: Group):
        self.plan, self.rank, self.group = plan, rank, group
        self.batch = key.shape[0]
        self.widths = key.shape[-1], value.shape[-1]
        self.send_sizes = [sum(map(self._elements, pieces)) for pieces in rank.sends]
        self.receive_sizes = [sum(map(self._elements, pieces)) for pieces in rank.receives]

    def start(self, key: Tensor, value: Tensor) -> Pending:
        """Start to send what other ranks lack, and to receive what this rank lacks."""
        parts = [
            self.own(tensor, piece).reshape(-1)
            for pieces in self.rank.sends
            for piece in pieces
            for tensor in (key, value)
        ]
        return self._flow(_flat(parts, key), self.send_sizes, self.receive_sizes)

    def finish(self, pending: Pending, key: Tensor, value: Tensor) -> list[Pair]:
        """Wait for an exchange; the keys and values of each table. A table of one piece is not
        copied."""
        received = self._pieces(pending.wait(), self.rank.receives)
        return [self._table(table, received, Pair(key, value)) for table in self.rank.tables]

    def start_reverse(self, gradients: Sequence[Pair], like: Tensor) -> Pending:
        """Start to send the gradients of fetched keys and values to the ranks that hold them, in
        the dtype of `like`.

        Args:
            gradients: of each table.
            like: a tensor of this rank.
        """
        once = self.rank.fetched_once
        dtype = like.dtype if once else lse_dtype(like)
        shape = (sum(self.receive_sizes),)
        flat = (like.new_empty if once else like.new_zeros)(shape, dtype=dtype)
        received = self._pieces(flat, self.rank.receives)
        for table, gradient in zip(self.rank.tables, gradients):
            for part in table.parts:
                if part.source != self.rank.rank:
                    for total, each in zip(
                        self._of(part, received), _in_table(table, gradient, part)
                    ):
                        total.copy_(each) if once else total.add_(each)
        return self._flow(flat.to(like.dtype), self.receive_sizes, self.send_sizes)

    def add_reverse(self, pending: Pending, gradients: Sequence[Pair], totals: Pair) -> None:
        """Wait for the gradients from other ranks, and add them to those of own keys and values,
        rank after rank; those of own keys in tables come first."""
        for table, gradient in zip(self.rank.tables, gradients):
            for part in table.parts:
                if part.source == self.rank.rank:
                    for total, each in zip(totals, _in_table(table, gradient, part)):
                        self.own(total, part.piece).add_(each)
        for pieces in self._pieces(pending.wait(), self.rank.sends):
            for piece, pair in pieces:
                for total, each in zip(totals, pair):
                    self.own(total, piece).add_(each)

    def own(self, tensor: Tensor, piece: Piece) -> Tensor:
        """View of the tokens of a piece in a tensor of this rank."""
        first = self.plan.offset(self.rank.rank, piece.keys[0])
        length = piece.keys[1] - piece.keys[0]
        entries = tensor[slice(*piece.entries), slice(*piece.heads)]
        return entries.narrow(2, first, length)

    def _table(self, table: Table, received: Received, own: Pair) -> Pair:
        """Keys and values of a table; what no piece fills is 0."""
        if len(table.parts) == 1 and table.is_full:
            return self._part(table.parts[0], received, own)
        first, last = table.entries
        entries = (self.batch if last is None else last) - first
        shape = entries, table.heads[1] - table.heads[0], table.length
        make = own.key.new_empty if table.is_full else own.key.new_zeros
        made = Pair(*(make(*shape, width) for width in self.widths))
        for part in table.parts:
            found = self._part(part, received, own)
            for place, tensor in zip(_in_table(table, made, part), found):
                place.copy_(tensor)
        return made

    def _part(self, part: Placed, received: Received, own: Pair) -> Pair:
        if part.source == self.rank.rank:
            return Pair(*(self.own(tensor, part.piece) for tensor in own))
        return self._of(part, received)

    def _of(self, part: Placed, received: Received) -> Pair:
        """View of a part of a table among pieces of other ranks."""
        for piece, pair in received[part.source]:
            if _holds(piece, part.piece):
                heads = slice(*(h - piece.heads[0] for h in part.piece.heads))
                keys = slice(*(k - piece.keys[0] for k in part.piece.keys))
                return Pair(*(tensor[:, heads, keys] for tensor in pair))
        raise AssertionError(f"no piece of rank {part.source} holds {part.piece}")

    def _pieces(self, flat: Tensor, pieces: Sequence[Sequence[Piece]]) -> Received:
        """Per other rank, views of a flat buffer: pieces with their keys and values."""
        offset = 0
        found: Received = []
        for each in pieces:
            found.append([])
            for piece in each:
                shape = self._shape(piece)
                views = []
                for width in self.widths:
                    count = shape[0] * shape[1] * shape[2] * width
                    views.append(flat.narrow(0, offset, count).view(*shape, width))
                    offset += count
                found[-1].append((piece, Pair(*views)))
        return found

    def _shape(self, piece: Piece) -> tuple[int, int, int]:
        first, last = piece.entries
        count = (self.batch if last is None else last) - first
        return count, piece.heads[1] - piece.heads[0], piece.keys[1] - piece.keys[0]

    def _elements(self, piece: Piece) -> int:
        entries, heads, tokens = self._shape(piece)
        return entries * heads * tokens * sum(self.widths)

    def _flow(
        self,
        sent: Tensor,
        send_sizes: Sequence[int],
        receive_sizes: Sequence[int],
    ) -> Pending:
        received = sent.new_empty(sum(receive_sizes))
        if not self.plan.exchanges:
            return Pending(sent, received, None)
        return start_all_to_all(sent, received, send_sizes, receive_sizes, self.group)


def start_all_to_all(
    sent: Tensor,
    received: Tensor,
    send_sizes: Sequence[int],
    receive_sizes: Sequence[int],
    group: Group,
) -> Pending:
    """Start an exchange of flat buffers with a part per rank, counted in elements.

    Elements travel as bytes: not every backend knows every dtype. NCCL copies with kernels, which
    other kernels keep waiting: they run on a stream of high priority, whose programs come first
    wherever another ends.
    """
    size = sent.element_size()

    def start(is_async: bool) -> Any:
        return dist.all_to_all_single(
            received.view(torch.uint8),
            sent.view(torch.uint8),
            [size * each for each in receive_sizes],
            [size * each for each in send_sizes],
            group=group,
            async_op=is_async,
        )

    if not (sent.is_cuda and "nccl" in dist.get_backend(group)):
        return Pending(sent, received, start(True).wait)
    stream = _exchange_stream(sent.device)
    stream.wait_stream(torch.cuda.current_stream(sent.device))
    with torch.cuda.stream(stream):
        start(False)
        over = stream.record_event()
    return Pending(sent, received, lambda: over.wait(torch.cuda.current_stream(sent.device)))


@cache
def _exchange_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


def _in_table(table: Table, pair: Pair, part: Placed) -> Pair:
    """View of a part of a table in tensors of the whole table."""
    heads = slice(*(h - table.heads[0] for h in part.piece.heads))
    length = part.piece.keys[1] - part.piece.keys[0]
    return Pair(*(each[:, heads].narrow(2, part.offset, length) for each in pair))


def _holds(piece: Piece, other: Piece) -> bool:
    """True if all keys of `other` are in `piece`."""
    ranges = (piece.heads, other.heads), (piece.keys, other.keys)
    inside = all(a[0] <= b[0] and b[1] <= a[1] for a, b in ranges)
    return piece.entries == other.entries and inside


def _flat(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat(list(parts)) if parts else like.new_empty(0)
