"""Attention of the newest tokens to what a `BandStore` holds.

Four ways to compute it, of which `_attend` takes the first that fits:

    _prefill         the store is empty: attention of the new tokens among themselves
    _decode_kernel   few queries on a GPU: one kernel reads the bands
    _decode_one      one query: gathers the bands
    _append_chunk    any number of queries: gathers the rings
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .attention import Result, choose, kernels_for
from .bands import BandPattern
from .cache import BandStore
from .cache_layout import SameReach
from .cache_prefix import check_held_documents, prefix_slots
from .checks import check_attention, check_no_tangents, check_tensors, readable
from .impl.attention_call import AttentionCall
from .impl.layout import empty_like_query, lse_dtype, score_scale, under_autocast, without_autocast
from .merging import merge
from .padding import padding_first, reorder, restore
from .scalars import as_flag


def band_attention_cached(
    query: Tensor,
    store: BandStore,
    pattern: BandPattern,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    scale: float | None = None,
    sinks: Tensor | None = None,
    key_start: Tensor | None = None,
    mask: Tensor | None = None,
    return_lse: bool = False,
) -> Result:
    """Attention of the newest tokens to what a store holds, equal to `band_attention` over the
    whole sequence.

    With `key` and `value` these are the tokens of `query`, and this call appends them to the store.
    There may be any number: a whole prompt or the next chunk of it. Without them the queries are
    the last tokens that are in the store already. They are then at most `max_rollback + 1`, less
    the tokens that `crop` took back and that were not replaced since (checked on the CPU).

    One query reads the keys in its bands and no others. Several read the rings, joined with their
    own keys before anything is overwritten. Where `band_attention` would choose `"triton"`, up to
    16 queries (and `max_rollback + 1`) read the keys in their bands alone; its first call with a
    number of queries must come before the capture of a CUDA graph.

    Args:
        query: `[B, H, Q, D]`.
        store: the layer's store. Its batch size, heads, dtype and device are those of query.
        pattern: the layer's bands, the same that the store was made for.
        key: `[B, Hkv, Q, D]`, or None.
        value: `[B, Hkv, Q, Dv]`, given with `key`.
        scale: factor of the scores before the softmax; default `1 / sqrt(D)`.
        sinks: `[H]`, as in `band_attention`.
        key_start: int32 `[B]` or `[B, Q]`, as in `band_attention`, counted from the first token
            that the store kept. Where the pattern has a prefix it stays from call to call, or moves
            to one of the new tokens (checked on the CPU).
        mask: bool `[B, Q]`, False for padding, given with `key`. Padding may be anywhere. It is not
            kept and has no position, its output is 0, and distances count tokens alone.
        return_lse: also return the log-sum-exp, `[B, H, Q]`.

    Returns:
        `out [B, H, Q, Dv]` with the dtype and memory layout of `query`; `head_dim` is always
        contiguous. Or `(out, lse)`.

    Raises:
        ValueError: if an argument breaks a rule above. The store is then as it was.
        RuntimeError: in a backward pass through the result: a store keeps no graph.
        NotImplementedError: in forward-mode differentiation.
    """
    if not isinstance(store, BandStore):
        raise ValueError(f"`store` must be a BandStore, got {type(store).__name__}")
    return_lse = as_flag("return_lse", return_lse)
    check_tensors(query=query)
    if (key is None) != (value is None):
        raise ValueError("`key` and `value` must be given together, got one of them")
    if key is not None and value is not None:
        check_tensors(key=key, value=value)
    elif mask is not None:
        raise ValueError("`mask` must be given with `key` and `value`, got no `key`")
    if pattern != store.pattern:
        raise ValueError(f"`pattern` must be the store's, {store.pattern}, got {pattern}")
    given = [tensor for tensor in (query, key, value) if tensor is not None]
    query, *tokens = under_autocast(*given)
    _check_query(query, store, tokens, scale, sinks, key_start, mask)
    check_no_tangents(**dict(zip(("query", "key", "value"), given)), sinks=sinks)
    with torch.no_grad(), without_autocast(query):
        out, lse = _attend(query, store, tokens, score_scale(query, scale), sinks, key_start, mask)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        out, lse = _WithoutBackward.apply(out, lse, *given)
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class _CachedCall:
    """One call, with padding at the left end of `query` and of the new tokens.

    Attributes:
        query: `[B, H, Q, D]`.
        tokens: key and value, `[B, Hkv, Q, D]` each, or none.
        scale: factor of the scores.
        sinks: `[H]`.
        key_start: int32 `[B]` or `[B, Q]`, as positions in the store.
        padding: int64 `[B]`, how many of the new tokens are padding; None: none is.
        given: key, value, mask and key_start as they came, for the store.
    """

    query: Tensor
    store: BandStore
    tokens: tuple[Tensor, ...]
    scale: float
    sinks: Tensor | None
    key_start: Tensor | None
    padding: Tensor | None
    given: tuple[Any, ...]

    def append(self) -> None:
        """Put the new tokens, which are checked, into the store, if there are any."""
        if self.tokens:
            key, value, mask, key_start = self.given
            self.store.take_up(key, value, mask, _store_start(self.store, key_start))


def _attend(
    query: Tensor,
    store: BandStore,
    tokens: list[Tensor],
    scale: float,
    sinks: Tensor | None,
    key_start: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)`; the new tokens, if any, are in the store afterwards."""
    if tokens:
        store.reserve(tokens[0].shape[2])
    if mask is None:
        given = (*tokens, None, key_start)
        call = _CachedCall(query, store, tuple(tokens), scale, sinks, key_start, None, given)
        return _strategy(call)
    order, hidden, given = padding_first(mask), ~mask[:, None, :, None], (*tokens, mask, key_start)
    if key_start is not None and key_start.dim() == 2:
        key_start = key_start.masked_fill(~mask, 0).gather(1, order)  # still never decreasing
    call = _CachedCall(
        reorder(query.masked_fill(hidden, 0.0), order),
        store,
        tuple(reorder(token, order) for token in tokens),
        scale,
        sinks,
        key_start,
        (~mask).sum(dim=1),
        given,
    )
    out, lse = _strategy(call)
    out = restore(out, order).masked_fill(hidden, 0.0)
    nothing = torch.full_like(lse[:1, :, :1], -torch.inf)
    if sinks is not None:
        nothing = sinks.to(lse.dtype)[None, :, None]
    lse = torch.where(hidden[..., 0], nothing, restore(lse[..., None], order)[..., 0])
    return out, lse


def _strategy(call: _CachedCall) -> tuple[Tensor, Tensor]:
    query, store = call.query, call.store
    if call.tokens and store.is_empty:
        return _prefill(call)
    kernels = kernels_for(query, store.values)
    if kernels is not None and query.shape[2] <= min(kernels.MAX_QUERIES, store.max_rollback + 1):
        return _decode_kernel(call, kernels)
    if query.shape[2] == 1:
        return _decode_one(call)
    return _append_chunk(call)


def _prefill(call: _CachedCall) -> tuple[Tensor, Tensor]:
    """The first tokens of a store: attention among themselves."""
    key_start = call.key_start
    if call.padding is not None:
        first = _first_key(call) + call.padding[:, None]
        key_start = first.clamp(max=call.query.shape[2]).to(torch.int32)
        key_start = key_start[:, 0] if key_start.shape[1] == 1 else key_start
    key, value = call.tokens
    pattern = call.store.layout.pattern
    result = _attend_bound(
        AttentionCall(call.query, key, value, pattern, call.scale, call.sinks, key_start=key_start)
    )
    call.append()
    return result


def _attend_bound(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """The implementation that `band_attention` would choose; arguments are checked already."""
    return choose(None, call.query, call.value).attend(call)


def _decode_kernel(call: _CachedCall, kernels: ModuleType) -> tuple[Tensor, Tensor]:
    """Few queries: so few tokens overwrite nothing that the first of them still sees."""
    store = call.store
    call.append()
    result: tuple[Tensor, Tensor] = kernels.attend_rings(
        call.query,
        store.keys,
        store.values,
        store.layout.pattern,
        offsets=store.offsets,
        lengths=store.lengths,
        prefixes=store.layout.all_heads.prefix,
        documents=store.documents,
        position=store.position,
        scale=call.scale,
        sinks=call.sinks,
        key_start=call.key_start,
    )
    return result


def _decode_one(call: _CachedCall) -> tuple[Tensor, Tensor]:
    """One query per sequence, the store's last token: gathers the keys in the bands."""
    query, store = call.query, call.store
    call.append()
    dtype = lse_dtype(query)
    out = query.new_zeros((*query.shape[:3], store.values.shape[-1]), dtype=dtype)
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=dtype)
    position = (store.position - 1)[:, None, None]
    start = _first_key(call)[:, -1]
    first = start[:, None, None]
    prefix = store.layout.pattern.prefix
    place = first + torch.arange(prefix, device=store.device)  # [B, 1, prefix]
    for same in store.layout.by_width:
        rings = same.rings
        step = torch.arange(same.width, device=store.device)
        beyond = step >= same.split[:, None]
        at = position - (same.near[:, None] + step + same.jump[:, None] * beyond)  # [B, C, W]
        seen = at >= first + prefix
        slots = rings.offset[:, None] + at % rings.length[:, None]
        if prefix:
            in_prefix = (place <= position).expand(-1, len(same.query_heads), -1)
            seen = torch.cat([seen, in_prefix], dim=-1)
            slots = torch.cat([slots, prefix_slots(store.stored, start, rings)], dim=-1)
        keys, values = store.gather(torch.where(seen, slots, store.layout.slots))  # [B, C, W, D]
        q = query.index_select(1, same.query_heads).to(dtype) * call.scale
        scores = (q @ keys.to(dtype).mT).masked_fill(~seen[:, :, None], -torch.inf)
        total = torch.logsumexp(scores, dim=-1)
        base = total.masked_fill(total == -torch.inf, 0.0)
        weights = torch.exp(scores - base[..., None])
        out.index_copy_(1, same.query_heads, weights @ values.to(dtype))
        lse.index_copy_(1, same.query_heads, total)
    if call.sinks is not None:
        out, lse = merge([(out, lse)], sinks=call.sinks)
    return empty_like_query(query, out.shape[-1]).copy_(out), lse


def _append_chunk(call: _CachedCall) -> tuple[Tensor, Tensor]:
    """Any number of queries: gathers the end of every ring in order of position, then their own
    tokens."""
    query, store, sinks = call.query, call.store, call.sinks
    out = empty_like_query(query, store.values.shape[-1])
    lse = query.new_empty(query.shape[:3], dtype=lse_dtype(query))
    first = _first_key(call)
    for same in store.layout.by_reach:
        keys, values, oldest = _keys_in_order(call, same)
        start = (first - oldest[:, None]).clamp(0, keys.shape[2])
        if same.pattern.prefix and call.padding is not None:
            start = torch.maximum(start, call.padding[:, None])  # where older tokens start at most
        start = start.to(torch.int32)
        start = start[:, 0] if start.shape[1] == 1 else start
        part = _attend_bound(
            AttentionCall(
                query.index_select(1, same.query_heads),
                keys,
                values,
                same.pattern,
                call.scale,
                None if sinks is None else sinks.index_select(0, same.query_heads),
                query_start=keys.shape[2] - query.shape[2],
                key_start=None if _all_zero(start) else start,
            )
        )
        out.index_copy_(1, same.query_heads, part[0])
        lse.index_copy_(1, same.query_heads, part[1])
    call.append()
    return out, lse


def _keys_in_order(call: _CachedCall, same: SameReach) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values that the queries of some heads may see, `[B, C, n, D]`, the last query's at
    the end; and the position of the first, int64 `[B]`. With a prefix that many places come first.
    """
    store, new = call.store, call.query.shape[2]
    prefix, rings = same.pattern.prefix if same.reach else 0, same.rings
    held = max(0, same.reach - 1) + (0 if call.tokens else new)
    end, gathered = store.position, held
    if call.padding is not None:
        # Where tokens are fewer than columns, more of the ring comes before them.
        end, gathered = end + (new - call.padding), held + new
    elif call.tokens:
        end = end + new
    total = held + (new if call.tokens else 0)
    oldest = end - total
    at = oldest[:, None] + torch.arange(gathered, device=store.device)
    slots = rings.offset[:, None] + at[:, None] % rings.length.clamp(min=1)[:, None]
    if prefix:
        padding = torch.zeros_like(oldest) if call.padding is None else call.padding
        slots = _with_prefix(call, same, slots, oldest, padding)
        held, total, oldest = held + prefix, total + prefix, oldest - prefix
    ring = store.gather(slots)
    if not call.tokens:
        return (*ring, oldest)
    own = [token[:, rings.heads] for token in call.tokens]
    if call.padding is None:
        keys, values = (torch.cat(pair, dim=2) for pair in zip(ring, own))
        return keys, values, oldest
    is_own = torch.arange(total, device=store.device) >= held + call.padding[:, None]
    is_own = is_own[:, None, :, None]
    keys, values = (
        torch.where(is_own, pad(token, (0, 0, held, 0)), old) for token, old in zip(own, ring)
    )
    return keys, values, oldest


def _with_prefix(
    call: _CachedCall, same: SameReach, slots: Tensor, oldest: Tensor, beyond: Tensor
) -> Tensor:
    """The ring's slots `[B, C, n]` with those of the prefix of the first query's document before
    them, without the prefix's tokens that the ring holds too. The first slot has position `oldest
    [B]`; no band reaches the first `beyond [B]` slots."""
    store, first, prefix = call.store, _first_key(call), same.pattern.prefix
    start = first[:, 0]
    if call.padding is not None and first.shape[1] > 1:
        start = first.gather(1, call.padding.clamp(max=first.shape[1] - 1)[:, None])[:, 0]
    older = (oldest + beyond - start).clamp(0, prefix)
    slots = pad(slots, (prefix, 0), value=store.layout.slots)
    place = torch.arange(slots.shape[2], device=store.device) - (prefix + beyond - older)[:, None]
    place = place[:, None].expand_as(slots)
    in_prefix = prefix_slots(store.stored, start, same.rings).gather(2, place.clamp(0, prefix - 1))
    return torch.where((place >= 0) & (place < older[:, None, None]), in_prefix, slots)


def _first_key(call: _CachedCall) -> Tensor:
    """Position of the first key that may be seen, int64 `[B, 1 or Q]`."""
    if call.key_start is None:
        return torch.zeros_like(call.store.position)[:, None]
    first = call.key_start.to(torch.int64).clamp(min=0)
    return first if first.dim() == 2 else first[:, None]


def _store_start(store: BandStore, key_start: Tensor | None) -> Tensor | None:
    """Document starts for the store; None where all are 0 or there is no prefix to keep."""
    if not store.pattern.prefix:
        return None
    if key_start is None and not store.one_document:
        return torch.zeros_like(store.position, dtype=torch.int32)
    return key_start


def _all_zero(start: Tensor) -> bool:
    """True if no key is hidden, so that sequences run together; False where reading it would wait
    for the GPU.
    """
    return readable(start) and not bool(start.any())


def _check_query(
    query: Tensor,
    store: BandStore,
    tokens: list[Tensor],
    scale: float | None,
    sinks: Tensor | None,
    key_start: Tensor | None,
    mask: Tensor | None,
) -> None:
    if query.dim() != 4:
        raise ValueError(f"`query` must be [B, H, length, D], got shape {list(query.shape)}")
    queries = query.shape[2]
    if tokens:
        store.check_tokens(tokens[0], tokens[1], mask, _store_start(store, key_start))
        if tokens[0].shape[2] != queries:
            raise ValueError(
                f"`key` must have as many tokens as `query`, {queries}, got {tokens[0].shape[2]}"
            )
        key, value = tokens
    else:
        _check_queries_in_store(queries, store)
        tokens_as_stored = (-1, store.num_key_heads, queries, -1)
        key = store.keys[:, None, :1].expand(tokens_as_stored)
        value = store.values[:, None, :1].expand(tokens_as_stored)
    check_attention(
        query,
        key,
        value,
        store.pattern,
        scale=scale,
        sinks=sinks,
        query_start=None,
        key_start=key_start,
    )
    if not tokens and store.pattern.prefix and readable(store.counts):
        check_held_documents(store.stored, key_start, queries)


def _check_queries_in_store(queries: int, store: BandStore) -> None:
    """Queries without keys are the store's last tokens."""
    most = store.max_rollback + 1
    if queries > most:
        raise ValueError(
            f"`query` must have at most max_rollback + 1 = {most} tokens when `key` is not given "
            f"(slack + 1 = {most}), got {queries}"
        )
    if not readable(store.counts):
        return
    behind = int(store.rolled_back.max())
    if queries + behind > most:
        raise ValueError(
            f"`query` must have at most max_rollback + 1 = {most} tokens, less {behind} that were "
            f"taken back, when `key` is not given, got {queries}"
        )
    fewest = int(store.position.min())
    if queries > fewest:
        raise ValueError(
            f"`query` must have at most the {fewest} tokens that are in the store when `key` is "
            f"not given, got {queries}"
        )


class _WithoutBackward(torch.autograd.Function):
    """Lets a model run outside `no_grad`, and refuses a gradient that would lack the store's
    part."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, lse: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return out.view_as(out), lse.view_as(lse)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError("band_attention_cached has no backward: use band_attention to train")
