"""Measure how much the loss of a dense model minds what its heads no longer attend.

The score between a query and a key has a gradient: `dS = p * (dO . v - dO . o)`, with weight p,
output o and value v. To first order, taking a set of keys from a query changes the loss by minus
the sum of their dS, divided by the weight that is left. Its square, a mean over queries, is what
curvature costs (Fisher information, one head and query at a time).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..fitting.bins import distance_edges

BLOCK = 128  # queries whose weights exist at a time
LEAST_LEFT = 1e-3  # share of attention that a query keeps at least


class SensitivitySums:
    """Sums over queries, float64 on the CPU, per layer.

    Attributes:
        edges: of the bins of distance.
        first: first tokens of a row, which are in no bin.
        queries: queries so far.
        gate: layer -> `[H]`, squared gradient of a gate on the head's output.
        bins: layer -> `[H, E]`, squared change of the loss without one bin.
        tail: layer -> `[H, E]`, squared change of the loss without any bin from that one on.
    """

    def __init__(self, length: int, first: int) -> None:
        self.edges, self.first, self.queries = distance_edges(length), first, 0
        self.gate: dict[int, Tensor] = {}
        self.bins: dict[int, Tensor] = {}
        self.tail: dict[int, Tensor] = {}

    def add(self, layer: int, gradient: Tensor, weights: Tensor, gate: Tensor, start: int) -> None:
        """Add a block of queries: dS and weights `[H, R, K]`, gradients of gates `[H, R]`."""
        by_bin, shares = (self._by_bin(each, start) for each in (gradient, weights))
        beyond, mass = (each.flip(-1).cumsum(-1).flip(-1) for each in (by_bin, shares))
        for sums, found in (
            (self.gate, gate),
            (self.bins, by_bin / (1 - shares).clamp(min=LEAST_LEFT)),
            (self.tail, beyond / (1 - mass).clamp(min=LEAST_LEFT)),
        ):
            total = found.double().square().sum(dim=1).cpu()
            sums[layer] = sums.get(layer, torch.zeros_like(total)) + total

    def _by_bin(self, values: Tensor, start: int) -> Tensor:
        """Sums over the keys of each bin, `[H, R, E]`, the first tokens left out."""
        rows, keys = values.shape[1:]
        distance = torch.arange(keys, device=values.device)
        key = torch.arange(start, start + rows, device=values.device)[:, None] - distance
        moved = values.gather(-1, key.clamp(min=0).expand(len(values), rows, keys))
        upto = F.pad(moved.masked_fill(key < self.first, 0.0).double().cumsum(-1), (1, 0))
        edges = torch.tensor(self.edges, device=values.device).clamp(max=keys)
        return upto[..., edges].diff(dim=-1)


class _Attention(torch.autograd.Function):
    """Causal attention of one row `[1, H, N, D]` in blocks of queries."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, layer: int, sums: Any
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.layer, ctx.sums = scale, layer, sums
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        for start, stop in _blocks(query.shape[2]):
            out[:, :, start:stop] = _weights(query, key, start, stop, scale) @ value[:, :, :stop]
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        query, key, value = ctx.saved_tensors
        d_query, d_key, d_value = map(torch.zeros_like, (query, key, value))
        for start, stop in _blocks(query.shape[2]):
            own, keys, values = gradient[:, :, start:stop], key[:, :, :stop], value[:, :, :stop]
            weights = _weights(query, key, start, stop, ctx.scale)
            gate = (own * (weights @ values)).sum(dim=-1)
            scores = weights * (own @ values.mT - gate[..., None])
            ctx.sums.add(ctx.layer, scores[0], weights[0], gate[0], start)
            d_query[:, :, start:stop] = scores @ keys * ctx.scale
            d_key[:, :, :stop] += scores.mT @ query[:, :, start:stop] * ctx.scale
            d_value[:, :, :stop] += weights.mT @ own
        return d_query, d_key, d_value, None, None, None


def measure(model: Any, rows: Iterable[Tensor], attention: Any, first: int) -> SensitivitySums:
    """Sums over rows of tokens `[N]`, each with its own backward pass.

    Args:
        model: of Transformers, with the attention `attention` that calls `attend`.
        rows: int64 tokens, all of one length.
        attention: context manager of the sums within which the model calls `attend`.
        first: first tokens that are in no bin.
    """
    sums: SensitivitySums | None = None
    for row in rows:
        sums = SensitivitySums(len(row), first) if sums is None else sums
        ids = row[None].to(model.device)
        with attention(sums), _frozen(model), torch.enable_grad():
            start = model.get_input_embeddings()(ids).detach().requires_grad_()
            logits = model(inputs_embeds=start, use_cache=False).logits[0, :-1].float()
            F.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
        sums.queries += len(row)
    assert sums is not None
    return sums


def attend(
    sums: SensitivitySums, module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """Causal attention `[1, N, H, Dv]` whose backward pass adds to sums."""
    group = query.shape[1] // key.shape[1]
    keys, values = (each.repeat_interleave(group, dim=1) for each in (key, value))
    out = _Attention.apply(query, keys, values, scale, module.layer_idx, sums)
    return out.transpose(1, 2)


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """No parameter collects a gradient within the context."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, BLOCK):
        yield start, min(start + BLOCK, length)


def _weights(query: Tensor, key: Tensor, start: int, stop: int, scale: float) -> Tensor:
    scores = (query[:, :, start:stop] @ key[:, :, :stop].mT) * scale
    tokens = torch.arange(stop, device=query.device)
    return scores.masked_fill(tokens > tokens[start:, None], -torch.inf).softmax(dim=-1)
