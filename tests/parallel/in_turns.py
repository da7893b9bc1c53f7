"""All ranks of `sharded_attention` in one process, one after another, without a process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch

from spattention.attention import choose
from spattention.parallel import Plan, exchange, sharded
from spattention.parallel.rank_calls import rank_plan

PASSES = 3  # what a pass sends arrives in the next: keys, then the gradients that need them


def attend(plan: Plan, rank: int, query, key, value, *, impl: str | None = None) -> Any:
    """Output and log-sum-exp of a rank; the exchange is the caller's."""
    implementation = choose(impl, query, value)
    scale = query.shape[3] ** -0.5
    setting = sharded.Setting(plan, rank_plan(plan, rank), None, scale, implementation)
    return sharded._Sharded.apply(query, key, value, None, setting)


class Wires:
    """What all ranks sent in the pass before, for `start_all_to_all` of one rank in this one."""

    def __init__(self, before: Wires | None = None) -> None:
        self.sent: dict[tuple[int, int], tuple[torch.Tensor, list[int]]] = {}
        self.before = {} if before is None else before.sent
        self.rank, self.trip = 0, 0

    def connect(self, rank: int) -> None:
        self.rank, self.trip = rank, 0

    def send(self, sent, received, send_sizes, receive_sizes, group) -> exchange.Pending:
        self.sent[self.rank, self.trip] = sent.clone(), list(send_sizes)
        received.zero_()
        start = 0
        for source, size in enumerate(receive_sizes):
            if self.before:
                flat, sizes = self.before[source, self.trip]
                first = sum(sizes[: self.rank])
                received[start : start + size] = flat[first : first + size]
            start += size
        self.trip += 1
        return exchange.Pending(sent, received, None)


def results(
    plan: Plan, tensors: Sequence[torch.Tensor], *, impl: str | None = None
) -> list[torch.Tensor]:
    """Output and the gradients of query, key and value of the whole sequence.

    Args:
        plan: for any number of ranks.
        tensors: query, key, value and the gradient of the output.
        impl: as in `band_attention`.
    """
    shards = plan.shards
    wires = None
    for _ in range(PASSES):
        wires = Wires(wires)
        found: list[list[torch.Tensor]] = []
        for rank in range(shards.ranks):
            wires.connect(rank)
            *inputs, d_out = (shards.split(tensor, rank, dim=2) for tensor in tensors)
            inputs = [tensor.requires_grad_() for tensor in inputs]
            with mock.patch.object(exchange, "start_all_to_all", wires.send):
                out, _ = attend(plan, rank, *inputs, impl=impl)
                grads = torch.autograd.grad(out, inputs, d_out)
            found.append([out.detach(), *grads])
    return [shards.join(list(parts), dim=2) for parts in zip(*found)]
