"""Attention on shards of a sequence: every rank fetches only the keys that its heads' bands reach.

Forward, on every rank:

    1. start to send the keys and values that others lack
    2. attend the keys of each range of queries itself
    3. wait for what this rank lacks, attend the keys before each range, and merge by log-sum-exp

Backward takes output and log-sum-exp of the whole, so that each call gives its share of the
gradients by itself. Keys before a range come first; their gradients travel back while those of the
ranges themselves are computed.

Keys before a range are a call for all heads, or for a few with similar numbers of them, on a table
that holds what each head's bands reach (`rank_calls.py`). Outputs are joined in float32 (float64
for float64 input) and rounded once, as one call's are: of half precision, the first call stores
next to its output what rounding took from it, and the second call's output is float32. That is less
to read and write than all outputs in float32, which more than two calls a query and sinks take. A
gradient of a query of two calls adds up in query's dtype, and so does a gradient of a key from up
to three places; other sums of gradients are float32. All sums have a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention import Result, choose
from ..impl.attention_call import WholeResults
from ..impl.layout import empty_like_query, lse_dtype, score_scale, without_autocast
from ..impl.partial import Part, PartResults
from ..impl.sinks import sink_gradient
from .agreement import Group
from .exchange import Exchange, Pair
from .pieces import Call, RankPlan
from .plan import Plan
from .prepare import prepare
from .rank_calls import rank_plan


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
    setting = Setting(plan, rank_plan(plan, rank), group, score_scale(query, scale), implementation)
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


class _Sharded(torch.autograd.Function):
    """Attention on a shard; results and gradients as in `sharded_attention`."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, setting: Setting
    ) -> tuple[Tensor, Tensor]:
        rank = setting.rank
        exchange = Exchange(setting.plan, rank, key, value, setting.group)
        pending = exchange.start(key, value)
        out = empty_like_query(query, value.shape[-1])
        if rank.sums > 2 or sinks is not None:
            out = torch.empty_like(out, dtype=lse_dtype(query))
        if not rank.covers[0]:
            out.zero_()
        lse = query.new_full(query.shape[:3], -torch.inf, dtype=lse_dtype(query))
        is_rounded = rank.sums == 2 and out.dtype != lse.dtype
        results = PartResults(out, lse, torch.empty_like(out) if is_rounded else None)
        for call in rank.local:
            _attend(setting, call, query, Pair(key, value), results)
        tables = exchange.finish(pending, key, value)
        del pending  # what was received is in the tables
        for call, table in zip(rank.fetched, tables):
            _attend(setting, call, query, table, results)
        del results
        if sinks is not None:
            _add_sinks(sinks, out, lse)
        if out.dtype != query.dtype:
            out = empty_like_query(query, value.shape[-1]).copy_(out)
        flat = [tensor for table in tables for tensor in table]
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
        tables = [Pair(*pair) for pair in zip(flat[::2], flat[1::2])]
        d_out = torch.zeros_like(out) if d_out is None else d_out
        whole = Whole(query, d_out, d_lse, out, lse)
        with without_autocast(query):
            parts = [
                _differentiate(setting, call, whole, table)
                for call, table in zip(rank.fetched, tables)
            ]
            d_tables = [Pair(*part[1:]) for part in parts]
            pending = exchange.start_reverse(d_tables, key)
            d_query, d_own = _own_gradients(setting, whole, Pair(key, value))
            for call, (d_rows, *_) in zip(rank.fetched, parts):
                _queries(setting, call, d_query).add_(d_rows)
            exchange.add_reverse(pending, d_tables, d_own)
            d_sinks = None
            if sinks is not None:
                d_sinks = sink_gradient(sinks, d_out, d_lse, out, lse).to(sinks.dtype)
        found = (gradient.to(query.dtype) for gradient in (d_query, *d_own))
        return (*found, d_sinks, None)


def _attend(
    setting: Setting, call: Call, query: Tensor, source: Pair, results: PartResults
) -> None:
    """Write one call's attention into `results`, or join it to what is there."""
    if call.first and not call.joined:
        results = results._replace(remainder=None)
    out, lse, remainder = results
    if remainder is not None:
        remainder = _queries(setting, call, remainder)
    setting.implementation.attend_part(
        _queries(setting, call, query),
        *(_keys(setting, call, tensor) for tensor in source),
        PartResults(_queries(setting, call, out), _queries(setting, call, lse), remainder),
        _part(setting, call, query.device),
        merge=not call.first,
    )


def _differentiate(
    setting: Setting,
    call: Call,
    whole: Whole,
    source: Pair,
    gradients: Sequence[Tensor] | None = None,
) -> Sequence[Tensor]:
    """One call's share of the gradients of query, key and value, in `gradients` or new tensors."""
    query, d_out, out = (
        _queries(setting, call, tensor) for tensor in (whole.query, whole.d_out, whole.out)
    )
    lse, d_lse = (
        None if tensor is None else _queries(setting, call, tensor).contiguous()
        for tensor in (whole.lse, whole.d_lse)
    )
    key, value = (_keys(setting, call, tensor) for tensor in source)
    if gradients is None:
        gradients = [empty_like_query(each, each.shape[3]) for each in (query, key, value)]
    assert lse is not None
    results, part = WholeResults(out, lse, d_out, d_lse), _part(setting, call, query.device)
    setting.implementation.differentiate_part(query, key, value, results, gradients, part)
    return gradients


def _own_gradients(setting: Setting, whole: Whole, own: Pair) -> tuple[Tensor, Pair]:
    """Gradients of query, key and value from the calls on own keys."""
    query, rank = whole.query, setting.rank
    make = torch.empty_like if rank.covers[1] else torch.zeros_like
    low = rank.sums <= 2, rank.key_sums <= 3, rank.key_sums <= 3
    totals = [
        make(tensor, dtype=tensor.dtype if is_low else whole.lse.dtype)
        for is_low, tensor in zip(low, (query, *own))
    ]
    for call in rank.local:
        views = [
            _queries(setting, call, totals[0]),
            *(_keys(setting, call, total) for total in totals[1:]),
        ]
        if call.first and call.first_keys:
            _differentiate(setting, call, whole, own, views)
        else:
            for view, share in zip(views, _differentiate(setting, call, whole, own)):
                view.add_(share)
    return totals[0], Pair(*totals[1:])


def _part(setting: Setting, call: Call, device: torch.device) -> Part:
    key_start = setting.plan.key_start(call, device)
    return Part(call.intervals, call.prefix, setting.scale, key_start, call.is_whole)


def _queries(setting: Setting, call: Call, tensor: Tensor) -> Tensor:
    """View of a call's queries in a tensor `[B, H, tokens, ...]` of this rank."""
    heads = tensor[slice(*call.entries), slice(*setting.plan.heads_of(call.heads))]
    first, stop = call.queries
    return heads.narrow(2, setting.plan.offset(setting.rank.rank, first), stop - first)


def _keys(setting: Setting, call: Call, tensor: Tensor) -> Tensor:
    """View of a call's keys in a tensor of this rank; all keys of its table."""
    if call.table is not None:
        return tensor
    first, stop = call.keys
    heads = tensor[slice(*call.entries), slice(*call.heads)]
    return heads.narrow(2, setting.plan.offset(setting.rank.rank, first), stop - first)


def _add_sinks(sinks: Tensor, out: Tensor, lse: Tensor) -> None:
    """Join sinks to output and log-sum-exp, in place."""
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    weight = torch.exp(lse - total).masked_fill_(lse == -torch.inf, 0.0)
    out.mul_(weight[..., None])
    lse.copy_(total)
