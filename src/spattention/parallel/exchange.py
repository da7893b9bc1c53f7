"""One exchange of keys and values among ranks, and its reverse for their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .agreement import Group
from .plan import Piece, Plan, RankPlan


class Fetched(NamedTuple):
    """Keys and values `[entries, heads, tokens, D]` of one buffer of the plan."""

    key: Tensor
    value: Tensor


class Pending:
    """A flat exchange that is under way.

    Args:
        sent: bytes to send, held until the exchange is over.
        received: bytes that arrive.
        work: handle of the exchange; None if nothing travels.
    """

    def __init__(self, sent: Tensor, received: Tensor, work: Any) -> None:
        self.sent, self.received, self.work = sent, received, work

    def wait(self) -> Tensor:
        """The received elements. On a GPU the current stream waits, not the host."""
        if self.work is not None:
            self.work.wait()
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

    def finish(self, pending: Pending) -> list[Fetched]:
        """Wait for an exchange; one entry per buffer. A buffer from one piece is not copied."""
        found: dict[tuple[int, Piece], Fetched] = {}
        for source, piece, key, value in self._pieces(pending.wait(), self.rank.receives):
            found[source, piece] = Fetched(key, value)
        buffers = []
        for buffer in self.rank.buffers:
            parts = [found[each] for each in buffer.sources]
            if len(parts) == 1:
                buffers.append(parts[0])
            else:
                keys, values = zip(*parts)
                buffers.append(Fetched(torch.cat(keys, 2), torch.cat(values, 2)))
        return buffers

    def start_reverse(self, gradients: Sequence[Fetched], like: Tensor) -> Pending:
        """Start to send the gradients of fetched keys and values to the ranks that hold them, in
        the dtype of `like`."""
        by_piece: dict[tuple[int, Piece], tuple[Tensor, Tensor]] = {}
        for buffer, gradient in zip(self.rank.buffers, gradients):
            for source, piece in buffer.sources:
                first = piece.keys[0] - buffer.piece.keys[0]
                length = piece.keys[1] - piece.keys[0]
                key, value = (each.narrow(2, first, length) for each in gradient)
                by_piece[source, piece] = key, value
        parts = [
            tensor.to(like.dtype).reshape(-1)
            for source, pieces in enumerate(self.rank.receives)
            for piece in pieces
            for tensor in by_piece[source, piece]
        ]
        return self._flow(_flat(parts, like), self.receive_sizes, self.send_sizes)

    def add_reverse(self, pending: Pending, d_key: Tensor, d_value: Tensor) -> None:
        """Wait for the gradients from other ranks, and add them, rank after rank."""
        for _, piece, key, value in self._pieces(pending.wait(), self.rank.sends):
            self.own(d_key, piece).add_(key)
            self.own(d_value, piece).add_(value)

    def own(self, tensor: Tensor, piece: Piece) -> Tensor:
        """View of the tokens of a piece in a tensor of this rank."""
        first = self.plan.offset(self.rank.rank, piece.keys[0])
        length = piece.keys[1] - piece.keys[0]
        entries = tensor[slice(*piece.entries), slice(*piece.heads)]
        return entries.narrow(2, first, length)

    def _pieces(
        self, flat: Tensor, pieces: Sequence[Sequence[Piece]]
    ) -> Iterator[tuple[int, Piece, Tensor, Tensor]]:
        """Views of a flat buffer: other rank, piece, key and value."""
        offset = 0
        for other, each in enumerate(pieces):
            for piece in each:
                shape = self._shape(piece)
                views = []
                for width in self.widths:
                    count = shape[0] * shape[1] * shape[2] * width
                    views.append(flat.narrow(0, offset, count).view(*shape, width))
                    offset += count
                yield other, piece, views[0], views[1]

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

    Elements travel as bytes: not every backend knows every dtype.
    """
    size = sent.element_size()
    work = dist.all_to_all_single(
        received.view(torch.uint8),
        sent.view(torch.uint8),
        [size * each for each in receive_sizes],
        [size * each for each in send_sizes],
        group=group,
        async_op=True,
    )
    return Pending(sent, received, work)


def _flat(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat(list(parts)) if parts else like.new_empty(0)
