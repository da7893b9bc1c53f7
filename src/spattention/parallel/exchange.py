"""One exchange of keys and values among ranks, and its reverse for their gradients.

All pieces for another rank travel in one message, keys and values together (`runs.py`). One copy
packs what is sent, and one fills all tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..compat.pytorch import add_each
from ..impl.layout import lse_dtype
from .agreement import Group
from .pieces import RankPlan, Table
from .plan import Plan
from .runs import Link, Run, consecutive, layout


class Pair(NamedTuple):
    """Keys and values `[entries, heads, tokens, D]`, or their gradients."""

    key: Tensor
    value: Tensor


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
        self.layout = layout(plan, rank, self.batch)
        self.sent = [sum(run.length for run in runs) for runs in self.layout.sends]

    def start(self, key: Tensor, value: Tensor) -> Pending:
        """Start to send what other ranks lack, and to receive what this rank lacks."""
        runs = [
            run.of(tensor) for runs in self.layout.sends for tensor in (key, value) for run in runs
        ]
        return self._flow(_joined(runs, key), self.sent, self.layout.received)

    def finish(self, pending: Pending, key: Tensor, value: Tensor) -> list[Pair]:
        """Wait for an exchange; the keys and values of each table. A table that is a part of a
        message is not copied."""
        messages = self._messages(pending.wait(), self.layout.received)
        sources: dict[int | None, Pair] = dict(enumerate(messages))
        sources[self.rank.rank] = Pair(key, value)
        gap = _longest_gap(self.layout.tables)
        sources[None] = Pair(*(key.new_zeros(1, 1, gap, width) for width in self.widths))
        runs = [
            link.there.of(sources[link.source][side])
            for links, is_copied in zip(self.layout.tables, self.layout.is_copied)
            if is_copied
            for side in (0, 1)
            for link in links
        ]
        flat, offset = _joined(runs, key), 0
        found = []
        for table, links, is_copied in zip(
            self.rank.tables, self.layout.tables, self.layout.is_copied
        ):
            entries, heads = self._shape(table)
            views = []
            for side, width in enumerate(self.widths):
                size = entries * heads * table.length
                if is_copied:
                    view = flat.narrow(0, offset, size * width)
                    offset += size * width
                else:
                    message = sources[links[0].source][side]
                    view = message[0, 0].narrow(0, links[0].there.first, size)
                views.append(view.view(entries, heads, table.length, width))
            found.append(Pair(*views))
        return found

    def start_reverse(self, gradients: Sequence[Pair], like: Tensor) -> Pending:
        """Start to send the gradients of fetched keys and values to the ranks that hold them, in
        the dtype of `like`.

        Args:
            gradients: of each table.
            like: a tensor of this rank.
        """
        if self.rank.fetched_once:
            runs = [
                link.here.of(gradients[link.table][side])
                for links in self.layout.fetched
                for side in (0, 1)
                for link in links
            ]
            return self._flow(_joined(runs, like), self.layout.received, self.sent)
        size = sum(self.layout.received) * sum(self.widths)
        total = like.new_zeros(size, dtype=lse_dtype(like))
        messages = self._messages(total, self.layout.received)
        for links, message in zip(self.layout.fetched, messages):
            for link in sorted(links, key=lambda link: link.table):
                for each, gradient in zip(message, gradients[link.table]):
                    link.there.of(each).add_(link.here.of(gradient))
        return self._flow(total.to(like.dtype), self.layout.received, self.sent)

    def add_reverse(self, pending: Pending, gradients: Sequence[Pair], totals: Pair) -> None:
        """Wait for the gradients from other ranks, and add them to those of own keys and values,
        rank after rank; those of own keys in tables come first."""
        for links, gradient in zip(self.layout.tables, gradients):
            own = [link for link in links if link.source == self.rank.rank]
            _add(totals, [link.there for link in own], gradient, [link.here for link in own])
        messages = self._messages(pending.wait(), self.sent)
        for runs, message in zip(self.layout.sends, messages):
            _add(totals, runs, message, consecutive(runs))

    def _messages(self, flat: Tensor, sizes: Sequence[int]) -> list[Pair]:
        """Per other rank, views `[1, 1, keys, D]` of its message."""
        offset = 0
        found = []
        for size in sizes:
            views = []
            for width in self.widths:
                views.append(flat.narrow(0, offset, size * width).view(1, 1, size, width))
                offset += size * width
            found.append(Pair(*views))
        return found

    def _shape(self, table: Table) -> tuple[int, int]:
        """Batch entries and heads of a table."""
        return len(range(self.batch)[slice(*table.entries)]), table.heads[1] - table.heads[0]

    def _flow(self, sent: Tensor, send: Sequence[int], receive: Sequence[int]) -> Pending:
        """Start an exchange of messages, whose sizes are counted in keys."""
        width = sum(self.widths)
        sizes = [width * size for size in send], [width * size for size in receive]
        received = sent.new_empty(sum(sizes[1]))
        if not self.plan.exchanges:
            return Pending(sent, received, None)
        return start_all_to_all(sent, received, *sizes, self.group)


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


def _joined(runs: Sequence[Tensor], like: Tensor) -> Tensor:
    """The elements of tensors `[tokens, D]` one after another, in one flat tensor."""
    if all(run.is_contiguous() for run in runs):
        return torch.cat([run.view(-1) for run in runs]) if runs else like.new_empty(0)
    flat = like.new_empty(sum(run.numel() for run in runs))
    for place, run in zip(flat.split([run.numel() for run in runs]), runs):
        place.view(run.shape).copy_(run)
    return flat


def _add(totals: Pair, places: Sequence[Run], parts: Pair, runs: Sequence[Run]) -> None:
    """Add keys and values of `parts` to places of `totals`, of which none is given twice, in one
    launch for many."""
    if not places:
        return
    sums = [place.of(total) for total in totals for place in places]
    add_each(sums, [run.of(part) for part in parts for run in runs])


def _longest_gap(tables: Sequence[Sequence[Link]]) -> int:
    gaps = [link.here.length for links in tables for link in links if link.source is None]
    return max(gaps, default=0)
