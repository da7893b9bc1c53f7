"""Matrix products that skip masked pairs, whatever those hold.

In an ordinary product a masked pair has the weight 0, and 0 times infinity or NaN is NaN: a value
that a query does not see would reach it. Here the sums are over the seen pairs alone, in the
results and in derivatives of every order.

Q  queries        K  keys        D  head_dim
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..compat.pytorch import schema
from .library import differentiable, register


def sum_of_seen(weights: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """The sum over each query's seen keys of weight `[..., Q, K]` times value `[..., K, D]`; no
    derivatives. Weights of masked pairs are never used."""
    weights = weights.masked_fill(~seen, 0.0)
    finite = values.isfinite()
    total = weights @ values.masked_fill(~finite, 0.0)
    # What the values left out add: one sign of infinity, or NaN for both signs, for infinity times
    # 0 and for NaN. Each is counted by a product of zeros and ones.
    sign, infinite = weights.sign(), values.sign().masked_fill(~values.isinf(), 0.0)
    excess = sign @ infinite
    infinities = sign.abs() @ infinite.abs()
    others = seen.to(values.dtype) @ (~finite).to(values.dtype) - infinities
    added = torch.where(excess.abs() == infinities, excess * torch.inf, torch.nan)
    added = added.masked_fill(infinities == 0, 0.0).masked_fill(others > 0, torch.nan)
    return total + added


def _scores(query: Tensor, key: Tensor, seen: Tensor) -> Tensor:
    return (query @ key.mT).masked_fill(~seen, 0.0)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.save_for_forward(*inputs)


def _gradients_of_scores(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    query, key, seen = ctx.saved_tensors
    d_query = weighted_sum(gradient, key, seen)
    return d_query, weighted_sum(gradient.mT, query, seen.mT), None


def _gradients_of_sum(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    weights, values, seen = ctx.saved_tensors
    d_weights = scores(gradient, values, seen)
    return d_weights, weighted_sum(weights.mT, gradient, seen.mT), None


def _tangent(product: Any) -> Any:
    """`jvp` of a product that is linear in each of its factors."""

    def jvp(ctx: Any, d_left: Tensor | None, d_right: Tensor | None, d_seen: None) -> Any:
        left, right, seen = ctx.saved_tensors
        parts = [] if d_left is None else [product(d_left, right, seen)]
        parts += [] if d_right is None else [product(left, d_right, seen)]
        return sum(parts[1:], start=parts[0])

    return jvp


def _batched(product: Any) -> None:
    """`vmap` of a product over leading axes."""

    def vmap(info: Any, in_dims: Any, *factors: Tensor) -> tuple[Tensor, int]:
        aligned = (
            factor[None] if dim is None else factor.movedim(dim, 0)
            for factor, dim in zip(factors, in_dims)
        )
        return product(*aligned), 0

    torch.library.register_vmap(schema(product).name, vmap)


_SCHEMA = "(Tensor {}, Tensor {}, Tensor seen) -> Tensor"
_EVERYWHERE = ("CompositeExplicitAutograd",)
scores = register(
    "masked_scores", _SCHEMA.format("query", "key"), _scores, _scores, keys=_EVERYWHERE
)
weighted_sum = register(
    "masked_sum", _SCHEMA.format("weights", "values"), sum_of_seen, sum_of_seen, keys=_EVERYWHERE
)
differentiable(scores, _save, _gradients_of_scores, _tangent(scores))
differentiable(weighted_sum, _save, _gradients_of_sum, _tangent(weighted_sum))
_batched(scores)
_batched(weighted_sum)
