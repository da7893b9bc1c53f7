"""Attention on shards of a sequence: every rank fetches only the keys that its heads' bands reach.

Forward, on every rank:

    1. start to send the keys and values that others lack
    2. attend the rank's own keys
    3. wait for what this rank lacks, attend it, and merge by log-sum-exp

Backward takes output and log-sum-exp of the whole, so that each call gives its share of the
gradients by itself. Fetched keys come first; their gradients travel back while the rank's own keys
are differentiated. Gradients add up in float32 (float64 for float64 input), in a fixed order.

Fetched keys of adjacent key/value heads that lack the same are one call of the operator. Heads that
lack different ranges are a call each, because the operator takes one start for all heads of a call.
A kernel with a start per head would need a single call: one launch in place of up to
`num_key_value_heads` in each direction, which matters where a rank has few queries.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention import Result, choose
from ..impl.attention_call import AttentionCall, WholeResults
from ..impl.layout import empty_like_query, lse_dtype, score_scale, without_autocast
from ..merging import merge_into
from .agreement import Group
from .exchange import Exchange, Fetched
from .plan import Call, Plan, RankPlan
from .prepare import prepare


def sharded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    *,
    group: Group = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Result:
    """`band_attention` over a sequence whose tokens are spread over ranks.

    Every rank calls it with its own tokens, in the order of `plan.shards`. The first call with a
    plan compares on all ranks what they are about to do. Later calls with the same plan and shapes
    do not: a rank that then departs alone ends at the timeout of `group`.

    Args:
        query: `[B, H, tokens, D]` of this rank.
        key: `[B, G, tokens, D]`.
        value: `[B, G, tokens, Dv]`.
        plan: from `plan_exchange`, the same on every rank.
        group: the ranks, in the order of `plan.shards`; None: all.
        scale: factor of the scores before the softmax; default `1 / sqrt(D)`.
        sinks: `[H]` learned logits, as in `band_attention`, the same on every rank. Their gradient
            is this rank's part; the sum over ranks is the whole.
        return_lse: also return the log-sum-exp, `[B, H, tokens]`.
        impl: as in `band_attention`.

    Returns:
        `out [B, H, tokens, Dv]`, or `(out, lse)`. The gradients of key and value contain what the
        queries of other ranks give to this rank's tokens.

    Raises:
        ValueError: on all ranks, if an argument of any of them breaks a rule above or differs.
        NotImplementedError: in forward-mode differentiation.
    """
    query, key, value, rank = prepare(query, key, value, plan, group, scale=scale, sinks=sinks)
    implementation = choose(impl, query, value)
    setting = Setting(plan, plan.for_rank(rank), group, score_scale(query, scale), implementation)
    with without_autocast(query):
        out, lse = _Sharded.apply(query, key, value, sinks, setting)
    return (out, lse) if return_lse else out


class Setting(NamedTuple):
    """Constants of one call: plan, this rank's work, ranks, factor of the scores, kernels."""

    plan: Plan
    rank: RankPlan
    group: Group
    scale: float
    implementation: ModuleType


class Whole(NamedTuple):
    """Tensors that the calls of a backward pass share: queries and results of all keys."""

    query: Tensor
    d_out: Tensor
    d_lse: Tensor | None
    out: Tensor
    lse: Tensor
    d_query: Tensor


class _Sharded(torch.autograd.Function):
    """Attention on a shard; results and gradients as in `sharded_attention`."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, setting: Setting
    ) -> tuple[Tensor, Tensor]:
        rank = setting.rank
        exchange = Exchange(setting.plan, rank, key, value, setting.group)
        pending = exchange.start(key, value)
        out, lse = _empty_results(query, value, rank)
        own = Fetched(key, value)
        for call in rank.local:
            _attend(setting, call, query, own, out, lse)
        buffers = exchange.finish(pending)
        for call in rank.fetched:
            assert call.buffer is not None
            _attend(setting, call, query, buffers[call.buffer], out, lse)
        if sinks is not None:
            _add_sinks(sinks, out, lse)
        if out.dtype != query.dtype:
            out = empty_like_query(query, value.shape[-1]).copy_(out)
        flat = [tensor for buffer in buffers for tensor in buffer]
        ctx.save_for_backward(query, key, value, sinks, out, lse, *flat)
        ctx.setting = setting
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, lse, *flat = ctx.saved_tensors
        setting: Setting = ctx.setting
        rank = setting.rank
        exchange = Exchange(setting.plan, rank, key, value, setting.group)
        buffers = [Fetched(*pair) for pair in zip(flat[::2], flat[1::2])]
        d_out = torch.zeros_like(out) if d_out is None else d_out
        whole = Whole(query, d_out, d_lse, out, lse, torch.zeros_like(query, dtype=lse.dtype))
        with without_autocast(query):
            d_buffers = [_zeros(buffer, lse.dtype) for buffer in buffers]
            for call in rank.fetched:
                assert call.buffer is not None
                _differentiate(setting, call, whole, buffers[call.buffer], d_buffers[call.buffer])
            pending = exchange.start_reverse(d_buffers, key)
            own = Fetched(key, value)
            d_own = _zeros(own, lse.dtype)
            for call in rank.local:
                _differentiate(setting, call, whole, own, d_own)
            exchange.add_reverse(pending, *d_own)
            d_sinks = None if sinks is None else _sink_gradient(sinks, whole)
        d_query, d_key, d_value = (gradient.to(query.dtype) for gradient in (whole.d_query, *d_own))
        return d_query, d_key, d_value, d_sinks, None


def _empty_results(query: Tensor, value: Tensor, rank: RankPlan) -> tuple[Tensor, Tensor]:
    """Output 0 and log-sum-exp -inf. The output is in the dtype of the sums if calls merge."""
    dtype = lse_dtype(query)
    out = empty_like_query(query, value.shape[-1])
    if not all(call.first for call in (*rank.local, *rank.fetched)):
        out = torch.empty_like(out, dtype=dtype)
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=dtype)
    return out.zero_(), lse


def _attend(
    setting: Setting, call: Call, query: Tensor, source: Fetched, out: Tensor, lse: Tensor
) -> None:
    """Join one call's attention to `out` and `lse`, in place."""
    bound = _bound(setting, call, _queries(setting, call, query), source)
    part, part_lse = setting.implementation.attend_part(bound)
    whole, whole_lse = _queries(setting, call, out), _queries(setting, call, lse)
    if call.first:
        whole.copy_(part)
        whole_lse.copy_(part_lse)
    else:
        merge_into(whole, whole_lse, part, part_lse)


def _differentiate(
    setting: Setting, call: Call, whole: Whole, source: Fetched, gradient: Fetched
) -> None:
    """Add one call's share to the gradients of query, key and value, in place."""
    query, d_out, out, d_query = (
        _queries(setting, call, tensor)
        for tensor in (whole.query, whole.d_out, whole.out, whole.d_query)
    )
    lse, d_lse = (
        None if tensor is None else _queries(setting, call, tensor).contiguous()
        for tensor in (whole.lse, whole.d_lse)
    )
    assert lse is not None
    bound = _bound(setting, call, query, source)
    results = WholeResults(out, lse, d_out, d_lse)
    found = setting.implementation.differentiate_part(bound, results)
    d_key, d_value = (_keys(setting, call, tensor) for tensor in gradient)
    for total, part in zip((d_query, d_key, d_value), found):
        total.add_(part)


def _bound(setting: Setting, call: Call, query: Tensor, source: Fetched) -> AttentionCall:
    """The call of an implementation on a call's queries and keys."""
    key, value = (_keys(setting, call, tensor) for tensor in source)
    return AttentionCall(
        query,
        key,
        value,
        call.pattern,
        setting.scale,
        query_start=call.queries[0] - call.keys[0],
        key_start=setting.plan.key_start(call, query.device),
    )


def _queries(setting: Setting, call: Call, tensor: Tensor) -> Tensor:
    """View of a call's queries in a tensor `[B, H, tokens, ...]` of this rank."""
    heads = tensor[slice(*call.entries), slice(*setting.plan.heads_of(call.heads))]
    first, stop = call.queries
    return heads.narrow(2, setting.plan.offset(setting.rank.rank, first), stop - first)


def _keys(setting: Setting, call: Call, tensor: Tensor) -> Tensor:
    """View of a call's keys in a tensor of this rank, or of the call's buffer."""
    first, stop = call.keys
    if call.buffer is None:
        heads = tensor[slice(*call.entries), slice(*call.heads)]
        return heads.narrow(2, setting.plan.offset(setting.rank.rank, first), stop - first)
    piece = setting.rank.buffers[call.buffer].piece
    heads = tensor[:, call.heads[0] - piece.heads[0] : call.heads[1] - piece.heads[0]]
    return heads.narrow(2, first - piece.keys[0], stop - first)


def _zeros(pair: Fetched, dtype: torch.dtype) -> Fetched:
    return Fetched(*(torch.zeros_like(tensor, dtype=dtype) for tensor in pair))


def _add_sinks(sinks: Tensor, out: Tensor, lse: Tensor) -> None:
    """Join sinks to output and log-sum-exp, in place."""
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    weight = torch.exp(lse - total).masked_fill_(lse == -torch.inf, 0.0)
    out.mul_(weight[..., None])
    lse.copy_(total)


def _sink_gradient(sinks: Tensor, whole: Whole) -> Tensor:
    """`[H]` of this rank's queries, head by head to spare memory."""
    found = []
    for head, sink in enumerate(sinks.to(whole.lse.dtype)):
        lse = whole.lse[:, head]
        delta = (whole.d_out[:, head].to(lse.dtype) * whole.out[:, head]).sum(dim=-1)
        if whole.d_lse is not None:
            delta = delta - whole.d_lse[:, head]
        weight = torch.exp(sink - lse).masked_fill_(lse == -torch.inf, 0.0)
        found.append(-(weight * delta).sum(dtype=torch.float64))
    return torch.stack(found).to(sinks.dtype)
