"""Measure how much the loss of a dense model minds what its heads no longer attend.

Add a term to the scores of a query with the keys of one bin of distance. The derivative of the loss
with respect to this term is the sum of `dS = p * (dO . v - dO . o)` over the bin, with weight p,
value v, output o and its gradient dO. Its square, a mean over queries, is the curvature of the loss
along the term (Fisher information): what it costs to take the bin from the head, to second order
and up to a factor. The same of the keys of a needle, with the loss of its answer alone, tells which
heads fetch it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .needles import Needle

BLOCK = 128  # queries whose weights exist at a time


class SensitivitySums:
    """Sums over queries, float64.

    Attributes:
        edges: of the bins of distance.
        first: first tokens of a row, which are in no bin.
        queries: queries so far.
        layers: layer -> `[H, E]`, squared derivative of the loss by bin.
    """

    def __init__(self, edges: Sequence[int], first: int) -> None:
        self.edges, self.first, self.queries = tuple(edges), first, 0
        self.layers: dict[int, Tensor] = {}

    def add(self, layer: int, gradient: Tensor, start: int) -> None:
        """Add dS `[H, R, K]` of a block of queries, the first of which is at `start`."""
        total = self._by_bin(gradient, start).square().sum(dim=1).cpu()
        self.layers[layer] = self.layers.get(layer, torch.zeros_like(total)) + total

    def end_row(self, tokens: int) -> None:
        """Count the queries of a row that is done."""
        self.queries += tokens

    def mean(self) -> Tensor:
        """Means over queries, `[L, H, E]`."""
        return torch.stack([self.layers[k] for k in sorted(self.layers)]) / self.queries

    def _by_bin(self, values: Tensor, start: int) -> Tensor:
        """Sums over the keys of each bin, `[H, R, E]`, the first tokens left out."""
        rows, keys = values.shape[1:]
        distance = torch.arange(keys, device=values.device)
        key = torch.arange(start, start + rows, device=values.device)[:, None] - distance
        moved = values.gather(-1, key.clamp(min=0).expand(len(values), rows, keys))
        upto = F.pad(moved.masked_fill(key < self.first, 0.0).double().cumsum(-1), (1, 0))
        edges = torch.tensor(self.edges, device=values.device).clamp(max=keys)
        return upto[..., edges].diff(dim=-1)


class NeedleSums:
    """Shares of the heads in how much the answers mind their needles: means over needles, float64.

    The keys are those of the needle's sentence, as a question finds it by its words. The queries
    come after it: those that predict the answer, and those before them that pass on what they
    found. Each needle counts the same, however sure the model is of it.
    """

    def __init__(self) -> None:
        self.needle: Needle | None = None
        self.count = 0
        self.shares = torch.zeros(())
        self._layers: dict[int, Tensor] = {}  # layer -> [H], of `needle`

    def add(self, layer: int, gradient: Tensor, start: int) -> None:
        """Add dS `[H, R, K]` of a block of queries, the first of which is at `start`."""
        assert self.needle is not None
        held = self.needle.sentence or self.needle.needle
        late = gradient[:, max(0, held.stop - start) :, held.start : held.stop]
        total = late.double().sum(dim=-1).square().sum(dim=-1).cpu()
        self._layers[layer] = self._layers.get(layer, torch.zeros_like(total)) + total

    def end_row(self, tokens: int) -> None:
        """Count a needle that is done; one that no head is minded for has no shares."""
        found = torch.stack([self._layers[k] for k in sorted(self._layers)])
        self.shares = self.shares + found / found.sum().clamp(min=torch.finfo(found.dtype).tiny)
        self.count += 1
        self._layers = {}

    def mean(self) -> Tensor:
        """Means over needles, `[L, H]`."""
        return self.shares / self.count


Sums = SensitivitySums | NeedleSums


class _Attention(torch.autograd.Function):
    """Causal attention of one row `[1, H, N, D]` in blocks of queries."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        sinks: Tensor | None,
        layer: int,
        sums: Sums,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.sinks, ctx.layer, ctx.sums = scale, sinks, layer, sums
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        for start, stop in _blocks(query.shape[2]):
            out[:, :, start:stop] = (
                _weights(query, key, start, stop, scale, sinks) @ value[:, :, :stop]
            )
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        query, key, value = ctx.saved_tensors
        d_query, d_key, d_value = map(torch.zeros_like, (query, key, value))
        for start, stop in _blocks(query.shape[2]):
            own, keys, values = gradient[:, :, start:stop], key[:, :, :stop], value[:, :, :stop]
            weights = _weights(query, key, start, stop, ctx.scale, ctx.sinks)
            delta = (own * (weights @ values)).sum(dim=-1, keepdim=True)
            scores = weights * (own @ values.mT - delta)
            ctx.sums.add(ctx.layer, scores[0], start)
            d_query[:, :, start:stop] = scores @ keys * ctx.scale
            d_key[:, :, :stop] += scores.mT @ query[:, :, start:stop] * ctx.scale
            d_value[:, :, :stop] += weights.mT @ own
        return d_query, d_key, d_value, None, None, None, None


def descend(model: Any, ids: Tensor, sums: Sums, predicted: range | None = None) -> None:
    """Take the gradient of the loss of a row of tokens `[N]`, down to what attention reads.

    Args:
        model: causal language model whose attention is `attend`.
        ids: the row.
        sums: what the gradients are added to.
        predicted: positions of the tokens whose loss it is; default all but the first.
    """
    ids = ids[None].to(model.device)
    places = range(1, ids.shape[1]) if predicted is None else predicted
    before = slice(places.start - 1, places.stop - 1)
    with _frozen(model), torch.enable_grad():
        start = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=start, use_cache=False).logits[0, before].float()
        targets = ids[0, places.start : places.stop]
        F.cross_entropy(logits, targets, reduction="sum").backward()
    sums.end_row(ids.shape[1])


def attend(
    sums: Sums,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention `[1, N, H, Dv]` of a layer, whose backward pass adds to sums."""
    group = query.shape[1] // key.shape[1]
    keys, values = (each.repeat_interleave(group, dim=1) for each in (key, value))
    out = _Attention.apply(query, keys, values, scale, sinks, layer, sums)
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


def _weights(
    query: Tensor, key: Tensor, start: int, stop: int, scale: float, sinks: Tensor | None
) -> Tensor:
    scores = (query[:, :, start:stop] @ key[:, :, :stop].mT) * scale
    tokens = torch.arange(stop, device=query.device)
    return softmax(scores.masked_fill(tokens > tokens[start:, None], -torch.inf), sinks)


def softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Weights `[B, H, R, K]` of scores; sinks `[H]` take their share."""
    if sinks is None:
        return scores.softmax(dim=-1)
    column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1].contiguous()
