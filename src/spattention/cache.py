"""Keys and values that the bands can still reach, and attention on them.

A key/value head keeps the last `reach + slack` tokens in a ring, `reach` the farthest distance that
any query head of its group attends: the token at position p lies in slot `p % length`. The rings of
all heads lie one after another in one buffer:

    head 0        head 1                head 2 (reaches nothing)   one slot of zeros
    [. . . .]     [. . . . . . . . .]                              [0]

The slack is what may be taken back (`crop`), and how many queries beyond one may come after their
own keys were written. Whatever a query does not see is read from the slot of zeros, so that shapes
never depend on positions, and positions never leave their device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import Result, _autocast, _scale, band_attention, kernels_for
from .bands import BandPattern
from .checks import check_attention, check_no_tangents, readable
from .impl.layout import empty_like_query, lse_dtype, without_autocast
from .merge import merge
from .rings import SLACK, Rings, ring_lengths, ring_tables


class BandStore:
    """The keys and values of one attention layer, as far as its bands reach, for generation.

    All memory is allocated here, once. Past the pattern's span it stays what it is and generation
    goes on without end. `append`, `reorder` and `band_attention_cached` wait for no device and
    change the tensors in place; positions are tensors, so a captured CUDA graph can be replayed.
    Nothing in a store is differentiable.

    Args:
        pattern: the layer's bands, one entry per query head.
        batch_size: rows B.
        num_key_heads: key/value heads, a divisor of the pattern's heads.
        head_dim: of the keys.
        value_dim: head_dim of the values; default `head_dim`.
        slack: tokens that `crop` can take back, at least 0.
        dtype: of keys and values.
        device: of everything; default PyTorch's.

    Attributes:
        keys: `[B, slots + 1, head_dim]`, the rings one after another, then one slot of zeros.
        values: `[B, slots + 1, value_dim]`.
        position: int64 `[B]`, tokens appended so far in each row: the position of the next one.
        offsets: int64 `[Hkv]`, first slot of each head's ring.
        lengths: int64 `[Hkv]`, slots of each head's ring; 0 for a head whose group sees nothing.

    Raises:
        ValueError: if a size breaks a rule above.
    """

    def __init__(
        self,
        pattern: BandPattern,
        batch_size: int,
        num_key_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        slack: int = SLACK,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        lengths = ring_lengths(pattern, num_key_heads, slack=slack)
        value_dim = head_dim if value_dim is None else value_dim
        for name, size in (
            ("batch_size", batch_size),
            ("head_dim", head_dim),
            ("value_dim", value_dim),
        ):
            if size < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}")
        if not dtype.is_floating_point:
            raise ValueError(f"`dtype` must be floating point, got {dtype}")
        self.pattern = pattern
        self.num_key_heads = num_key_heads
        self.slack = slack
        self._slots = sum(lengths)
        shape = (batch_size, self._slots + 1)
        # What inference mode makes cannot be written outside it, in another turn of a dialogue.
        with torch.inference_mode(False):
            self.keys = torch.zeros(*shape, head_dim, dtype=dtype, device=device)
            self.values = torch.zeros(*shape, value_dim, dtype=dtype, device=device)
            self.position = torch.zeros(batch_size, dtype=torch.int64, device=device)
            # Highest position ever reached: what lies a ring's length before it is overwritten.
            self._reached = torch.zeros_like(self.position)
        # Known without waiting for the device: nothing was appended since the last reset.
        self._untouched = True
        self._make_tables()

    @property
    def batch_size(self) -> int:
        """Rows B."""
        return self.keys.shape[0]

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.keys.device

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.keys.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def append(self, key: Tensor, value: Tensor) -> None:
        """Write the next tokens: key `[B, Hkv, n, D]`, value `[B, Hkv, n, Dv]`, the store's dtype.

        Of more tokens than a ring holds only the last are written. Queries that are to see tokens
        overwritten by this call must come first: `band_attention_cached` does both in order.
        """
        self._check_tokens(key, value)
        new = key.shape[2]
        if new == 0:
            return
        kernels = kernels_for(key, value)
        with torch.no_grad():
            if kernels is not None:
                kernels.write_rings(
                    key,
                    value,
                    keys=self.keys,
                    values=self.values,
                    position=self.position,
                    offsets=self.offsets,
                    lengths=self.lengths,
                )
            else:
                for rings in (self._live,) if new <= self._live.shortest else self._by_length:
                    last = min(new, rings.shortest)
                    if last > 0:
                        self._write(rings, key[:, :, new - last :], value[:, :, new - last :], new)
            self.position.add_(new)
            self._reached.copy_(torch.maximum(self._reached, self.position))
        self._untouched = False

    def crop(self, tokens: int) -> None:
        """Take back the last `tokens` tokens of every row. Reads positions, so it waits for the
        device.

        Raises:
            ValueError: if there are fewer tokens, or if, with those taken back before and not
                replaced since, they are more than `slack`: keys that are needed again would be
                overwritten.
        """
        tokens = int(tokens)
        if tokens < 0:
            raise ValueError(f"`tokens` must not be negative, got {tokens}")
        fewest = int(self.position.min())
        if tokens > fewest:
            raise ValueError(f"`tokens` must be at most the {fewest} in the store, got {tokens}")
        behind = int((self._reached - self.position).max())
        if behind + tokens > self.slack:
            before = f" after {behind} that were taken back before" if behind else ""
            raise ValueError(
                f"`tokens` must be at most the store's `slack` = {self.slack}, got {tokens}{before}"
            )
        self.position.sub_(tokens)

    def reorder(self, rows: Tensor) -> None:
        """Row b becomes what row `rows[b]` was (beam search): int `[B]`. In place."""
        if rows.dim() != 1 or rows.shape[0] != self.batch_size:
            raise ValueError(
                f"`rows` must be [B] = [{self.batch_size}], got {list(rows.shape)}: "
                "use `select` to change the batch"
            )
        if rows.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"`rows` must be int32 or int64, got {rows.dtype}")
        rows = rows.to(self.device)
        for tensor in (self.keys, self.values, self.position, self._reached):
            tensor.copy_(tensor[rows])

    @torch.inference_mode(False)
    def select(self, rows: Tensor) -> None:
        """Keep these rows alone, in this order: int `[rows]` or bool `[B]`. Allocates anew."""
        rows = rows.to(self.device)
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.position, self._reached = self.position[rows], self._reached[rows]

    def repeat(self, times: int) -> None:
        """Every row `times` times, copies side by side. Allocates anew."""
        if times < 1:
            raise ValueError(f"`times` must be at least 1, got {times}")
        rows = torch.arange(self.batch_size, device=self.device)
        self.select(rows.repeat_interleave(times))

    def reset(self) -> None:
        """Empty the store, for another text. Keeps the memory."""
        self.position.zero_()
        self._reached.zero_()
        self._untouched = True

    @torch.inference_mode(False)
    def to(self, device: torch.device | str) -> BandStore:
        """Move everything to another device; returns the store itself."""
        self.keys, self.values = self.keys.to(device), self.values.to(device)
        self.position, self._reached = self.position.to(device), self._reached.to(device)
        self._make_tables()
        return self

    def _make_tables(self) -> None:
        tables = ring_tables(
            self.pattern, self.num_key_heads, slack=self.slack, device=self.keys.device
        )
        self.offsets, self.lengths, self._live, self._by_length, self._reaches, self._widths = (
            tables
        )

    def _check_tokens(self, key: Tensor, value: Tensor) -> None:
        for name, tensor, buffer in (("key", key, self.keys), ("value", value, self.values)):
            rows, dim = buffer.shape[0], buffer.shape[2]
            wanted = (rows, self.num_key_heads, dim)
            if tensor.dim() != 4 or (*tensor.shape[:2], tensor.shape[3]) != wanted:
                raise ValueError(
                    f"`{name}` must have the store's shape [B, Hkv, n, D] = "
                    f"[{rows}, {self.num_key_heads}, n, {dim}], got {list(tensor.shape)}"
                )
            if tensor.dtype != buffer.dtype or tensor.device != buffer.device:
                raise ValueError(
                    f"`{name}` must have the store's dtype and device, {buffer.dtype} on "
                    f"{buffer.device}, got {tensor.dtype} on {tensor.device}"
                )
        if value.shape[2] != key.shape[2]:
            raise ValueError(
                f"`value` must have as many tokens as `key`, {key.shape[2]}, got {value.shape[2]}"
            )

    def _write(self, rings: Rings, key: Tensor, value: Tensor, new: int) -> None:
        """The last tokens of `new`, at most as many as the rings hold, so that no slot is written
        twice."""
        at = self.position[:, None] + torch.arange(new - key.shape[2], new, device=self.device)
        slots = rings.offset[:, None] + at[:, None] % rings.length[:, None]  # [B, C, n]
        index = self._flat(slots)
        for buffer, tokens in ((self.keys, key), (self.values, value)):
            tokens = tokens.index_select(1, rings.heads).reshape(-1, tokens.shape[-1])
            buffer.flatten(0, 1).index_copy_(0, index, tokens)

    def _read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `[B, ..., D]` and values in these slots, `[B, ...]`."""
        index = self._flat(slots)
        keys, values = (t.flatten(0, 1).index_select(0, index) for t in (self.keys, self.values))
        return keys.unflatten(0, slots.shape), values.unflatten(0, slots.shape)

    def _flat(self, slots: Tensor) -> Tensor:
        rows = torch.arange(self.batch_size, device=self.device) * (self._slots + 1)
        return (slots + rows.view(-1, *(1,) * (slots.dim() - 1))).flatten()


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
    return_lse: bool = False,
) -> Result:
    """Attention of the newest tokens to what a store holds, equal to `band_attention` over the
    whole sequence.

    With `key` and `value` these are the tokens of `query`, and come into the store in this call:
    any number, a whole prompt or the next chunk of it. Without them the queries are the last tokens
    that are in the store already, at most `slack + 1` less those taken back by `crop` and not
    replaced since (checked on the CPU).

    One query reads the keys in its bands and no others. Several read the rings, joined with their
    own keys before anything is overwritten. Where `band_attention` would choose `"triton"`, up to
    16 queries (and `slack + 1`) read the keys in their bands alone; its first call with a number of
    queries must come before the capture of a CUDA graph.

    Args:
        query: `[B, H, Q, D]`.
        store: of this layer; its rows, heads, dtype and device are those of query.
        pattern: the layer's bands, the same that the store was made for.
        key: `[B, Hkv, Q, D]`, or None.
        value: `[B, Hkv, Q, Dv]`, given with `key`.
        scale: factor of the scores before the softmax; default `1 / sqrt(D)`.
        sinks: `[H]`, as in `band_attention`.
        key_start: int32 `[B]` (left padding) or `[B, Q]`, as in `band_attention`, counted from the
            first token that the store ever got.
        return_lse: also return the log-sum-exp, `[B, H, Q]`.

    Returns:
        `out [B, H, Q, Dv]` with query's dtype and order of axes in memory, but for
        head_dim, which is innermost; or `(out, lse)`.

    Raises:
        ValueError: if an argument breaks a rule above. Going backward through the result raises
            RuntimeError: a store keeps no graph.
        NotImplementedError: in forward-mode differentiation.
    """
    if not isinstance(store, BandStore):
        raise ValueError(f"`store` must be a BandStore, got {type(store).__name__}")
    if (key is None) != (value is None):
        raise ValueError("`key` and `value` must be given together, got one of them")
    if pattern != store.pattern:
        raise ValueError(f"`pattern` must be the store's, {store.pattern}, got {pattern}")
    given = [tensor for tensor in (query, key, value) if tensor is not None]
    query, *tokens = _autocast(*given)
    _check_query(query, store, tokens, scale, sinks, key_start)
    check_no_tangents(**dict(zip(("query", "key", "value"), given)), sinks=sinks)
    with torch.no_grad(), without_autocast(query):
        out, lse = _attend(query, store, tokens, _scale(query, scale), sinks, key_start)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        out, lse = _WithoutBackward.apply(out, lse, *given)
    return (out, lse) if return_lse else out


def _attend(
    query: Tensor,
    store: BandStore,
    tokens: list[Tensor],
    scale: float,
    sinks: Tensor | None,
    key_start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)`; tokens, if any, are in the store afterwards."""
    if tokens and store._untouched:
        result = band_attention(
            query,
            tokens[0],
            tokens[1],
            store.pattern,
            scale=scale,
            sinks=sinks,
            key_start=key_start,
            return_lse=True,
        )
        store.append(*tokens)
        return result[0], result[1]
    kernels = kernels_for(query, store.values)
    if kernels is not None and query.shape[2] <= min(kernels.MAX_QUERIES, store.slack + 1):
        # So few tokens overwrite nothing that the first of them still sees.
        if tokens:
            store.append(*tokens)
        out, lse = kernels.attend_rings(
            query,
            store.keys,
            store.values,
            store.pattern,
            offsets=store.offsets,
            lengths=store.lengths,
            position=store.position,
            scale=scale,
            sinks=sinks,
            key_start=key_start,
        )
        return out, lse
    if query.shape[2] == 1:
        if tokens:
            store.append(*tokens)
        out, lse = merge([_attend_bands(query, store, scale, key_start)], sinks=sinks)
        return empty_like_query(query, out.shape[-1]).copy_(out), lse
    result = _attend_rings(query, store, tokens, scale, sinks, key_start)
    if tokens:
        store.append(*tokens)
    return result


def _attend_bands(
    query: Tensor, store: BandStore, scale: float, key_start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One query per row, the store's last token, without sinks: reads the keys in the bands."""
    dtype = lse_dtype(query)
    out = query.new_zeros((*query.shape[:3], store.values.shape[-1]), dtype=dtype)
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=dtype)
    position = (store.position - 1)[:, None, None]
    first = _first_key(store, key_start)[:, -1, None, None]
    for same in store._widths:
        step = torch.arange(same.width, device=store.device)
        beyond = step >= same.split[:, None]
        at = position - (same.near[:, None] + step + same.jump[:, None] * beyond)  # [B, C, W]
        seen = at >= first
        slots = same.offset[:, None] + at % same.length[:, None]
        keys, values = store._read(torch.where(seen, slots, store._slots))  # [B, C, W, D]
        q = query.index_select(1, same.heads).to(dtype) * scale
        scores = (q @ keys.to(dtype).mT).masked_fill(~seen[:, :, None], -torch.inf)
        total = torch.logsumexp(scores, dim=-1)
        base = total.masked_fill(total == -torch.inf, 0.0)
        weights = torch.exp(scores - base[..., None])
        out.index_copy_(1, same.heads, weights @ values.to(dtype))
        lse.index_copy_(1, same.heads, total)
    return out, lse


def _attend_rings(
    query: Tensor,
    store: BandStore,
    tokens: list[Tensor],
    scale: float,
    sinks: Tensor | None,
    key_start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Queries against the end of every ring in order of position, then their own tokens."""
    queries = query.shape[2]
    out = empty_like_query(query, store.values.shape[-1])
    lse = query.new_empty(query.shape[:3], dtype=lse_dtype(query))
    first = _first_key(store, key_start)
    for same in store._reaches:
        held = max(0, same.reach - 1) + (0 if tokens else queries)
        oldest = store.position - held  # position of the first key at hand
        at = oldest[:, None] + torch.arange(held, device=store.device)  # [B, held]
        slots = same.offset[:, None] + at[:, None] % same.length.clamp(min=1)[:, None]
        parts = [store._read(slots)]
        if tokens:
            parts.append((tokens[0][:, same.key_heads], tokens[1][:, same.key_heads]))
        keys, values = (torch.cat(pair, dim=2) for pair in zip(*parts))
        start = (first - oldest[:, None]).clamp(0, held + queries).to(torch.int32)
        start = start[:, 0] if start.shape[1] == 1 else start
        part = band_attention(
            query.index_select(1, same.query_heads),
            keys,
            values,
            same.pattern,
            scale=scale,
            sinks=None if sinks is None else sinks.index_select(0, same.query_heads),
            key_start=None if _all_zero(start) else start,
            return_lse=True,
        )
        out.index_copy_(1, same.query_heads, part[0])
        lse.index_copy_(1, same.query_heads, part[1])
    return out, lse


def _first_key(store: BandStore, key_start: Tensor | None) -> Tensor:
    """Position of the first key that may be seen, int64 `[B, 1 or Q]`."""
    if key_start is None:
        return torch.zeros_like(store.position)[:, None]
    first = key_start.to(torch.int64).clamp(min=0)
    return first if first.dim() == 2 else first[:, None]


def _all_zero(start: Tensor) -> bool:
    """Whether nothing is hidden, where asking costs nothing: rows then run together."""
    return readable(start) and not bool(start.any())


def _check_query(
    query: Tensor,
    store: BandStore,
    tokens: list[Tensor],
    scale: float | None,
    sinks: Tensor | None,
    key_start: Tensor | None,
) -> None:
    if tokens:
        store._check_tokens(tokens[0], tokens[1])
        if query.dim() == 4 and tokens[0].shape[2] != query.shape[2]:
            raise ValueError(
                f"`key` must have as many tokens as `query`, {query.shape[2]}, got "
                f"{tokens[0].shape[2]}"
            )
        key, value = tokens
    elif query.dim() == 4 and query.shape[2] > store.slack + 1:
        raise ValueError(
            f"`query` must have at most slack + 1 = {store.slack + 1} tokens when `key` is not "
            f"given, got {query.shape[2]}"
        )
    else:
        if query.dim() == 4 and readable(store.position):
            behind = int((store._reached - store.position).max())
            if query.shape[2] + behind > store.slack + 1:
                raise ValueError(
                    f"`query` must have at most slack + 1 = {store.slack + 1} tokens, less "
                    f"{behind} that were taken back, when `key` is not given, got "
                    f"{query.shape[2]}"
                )
        tokens_as_stored = (-1, store.num_key_heads, query.shape[-2], -1)
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


class _WithoutBackward(torch.autograd.Function):
    """Lets a model run outside `no_grad`, and refuses a gradient that would lack the store's
    part."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, lse: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return out.view_as(out), lse.view_as(lse)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError("band_attention_cached has no backward: use band_attention to train")
