"""Keys and values that the bands can still reach, and what changes them.

`cache_layout.py` says where each token is stored, `cache_prefix.py` keeps the first tokens of a
document where the pattern has a prefix, and `cached_attention.py` attends to the tokens.
Slots that a query does not see are read as the slot of zeros, so that shapes do not depend on
positions and positions stay on their device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cache_prefix
from .attention import kernels_for
from .bands import BandPattern
from .cache_layout import (
    MAX_ROLLBACK,
    UNSET,
    HeadGroup,
    RingLayout,
    as_device,
    capacity_needed,
    check_memory,
    checked_int,
    ring_layout,
    ring_lengths,
    rollback,
    tokens_in_reach,
)
from .cache_prefix import StoredTokens
from .checks import check_dtype, check_key_start, check_new_tokens, check_rows, in_graph, readable
from .padding import padding_first, reorder
from .scalars import as_int


class BandStore:
    """The keys and values of one attention layer, as far as its bands reach, for generation.

    All memory is allocated here, unless `capacity` says otherwise. Past the pattern's span a store
    keeps its size, and generation continues without end. `append`, `reorder` and
    `band_attention_cached` wait for no device and change the tensors in place. Positions are
    tensors, so a captured CUDA graph can be replayed. Nothing in a store is differentiable.

    Args:
        pattern: the layer's bands, one entry per query head.
        batch_size: number of sequences B.
        num_key_heads: number of key/value heads, a divisor of the pattern's heads.
        head_dim: head_dim of the keys.
        value_dim: head_dim of the values; default `head_dim`.
        max_rollback: tokens that `crop` can take back, at least 0. It also bounds how many queries
            beyond one may attend after their own keys were appended.
        capacity: tokens per sequence to allocate room for at first; default: all that the bands
            reach. A store that gets more tokens grows to twice the room, which moves its memory.
            Growing counts tokens on the host, so until its rings have their full length a store
            cannot be used in `torch.compile` or the capture of a CUDA graph.
        dtype: of keys and values.
        device: of everything; default PyTorch's.
        slack: former name of `max_rollback`.

    Attributes:
        keys: `[B, slots + 1, head_dim]`, the rings, the prefixes, then one slot of zeros.
        values: `[B, slots + 1, value_dim]`.
        layout: the `cache_layout.RingLayout` of both.
        counts: int64 `[4, B]`: `position`, `columns`, and both as if nothing had been taken back.
        documents: int64 `[B, max_rollback + 2]`, where documents start; see `cache_prefix`.
        capacity: tokens that there is room for; None once the rings have their full length.
        is_empty: nothing was appended since the store was made or reset.
        one_document: no `key_start` was given since then, so that all documents start at 0.

    Raises:
        ValueError: if a size breaks a rule above, or the memory is more than the device has.
    """

    keys: Tensor
    values: Tensor
    documents: Tensor
    layout: RingLayout
    max_rollback: int
    capacity: int | None

    def __init__(
        self,
        pattern: BandPattern,
        batch_size: int,
        num_key_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        max_rollback: int = MAX_ROLLBACK,
        capacity: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        slack: int = UNSET,
    ) -> None:
        max_rollback = rollback(max_rollback, slack)
        lengths = ring_lengths(pattern, num_key_heads, max_rollback=max_rollback, capacity=capacity)
        value_dim = head_dim if value_dim is None else value_dim
        batch_size = checked_int("batch_size", batch_size, at_least=1)
        head_dim = checked_int("head_dim", head_dim, at_least=1)
        value_dim = checked_int("value_dim", value_dim, at_least=1)
        check_dtype("dtype", dtype)
        target = torch.empty(0, device=as_device(device)).device
        self.pattern = pattern
        self.num_key_heads = len(lengths)
        # Known on the host, without waiting for the device.
        self.is_empty = self.one_document = True
        self._columns = 0  # appended so far; counted while the rings are not at their full length
        self._tokens = 0  # at least this number is in each sequence; not counted in compiled graphs
        # Tensors made in inference mode cannot be written outside it, in a later turn.
        with torch.inference_mode(False):
            dims = head_dim, value_dim
            self._allocate(as_int(capacity), max_rollback, batch_size, dims, dtype, target)
            self.counts = torch.zeros(4, batch_size, dtype=torch.int64, device=target)
            self._padding = self.counts.new_full((batch_size, max_rollback), -1)

    @property
    def batch_size(self) -> int:
        """Number of sequences B."""
        return self.keys.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the store."""
        return self.keys.device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the keys and values."""
        return self.keys.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def _token_bytes(self) -> int:
        return (self.keys.shape[2] + self.values.shape[2]) * self.dtype.itemsize

    @property
    def slack(self) -> int:
        """Former name of `max_rollback`."""
        return self.max_rollback

    @property
    def position(self) -> Tensor:
        """int64 `[B]`, tokens kept so far in each sequence: the position of the next one."""
        return self.counts[0]

    @property
    def columns(self) -> Tensor:
        """int64 `[B]`, tokens appended so far, padding included."""
        return self.counts[1]

    @property
    def rolled_back(self) -> Tensor:
        """int64 `[B]`, how much of `max_rollback` is used up: tokens taken back and not replaced
        since."""
        return self.counts[2] - self.counts[0]

    @property
    def offsets(self) -> Tensor:
        """int64 `[Hkv]`, first slot of each head's ring."""
        return self.layout.offsets

    @property
    def lengths(self) -> Tensor:
        """int64 `[Hkv]`, slots of each head's ring; 0 for a head whose group attends nothing."""
        return self.layout.lengths

    @property
    def stored(self) -> StoredTokens:
        """The tensors that `cache_prefix` works on."""
        return StoredTokens(self.keys, self.values, self.counts, self.documents, self.layout)

    def append(
        self,
        key: Tensor,
        value: Tensor,
        *,
        mask: Tensor | None = None,
        key_start: Tensor | None = None,
    ) -> None:
        """Write the next tokens. Of more tokens than a ring holds only the last are written, and
        the first of each document that are the pattern's prefix.

        Queries that are to see tokens which this call overwrites must come first:
        `band_attention_cached` does both in order.

        Args:
            key: `[B, Hkv, n, D]`, the store's dtype.
            value: `[B, Hkv, n, Dv]`, likewise.
            mask: bool `[B, n]`, False for padding, which is not kept and has no position.
            key_start: int32 `[B]` or `[B, n]`, where each token's document starts, as in
                `band_attention`, counted in tokens that the store kept. Default: the last token's
                document continues, at first that of position 0. Only a pattern with a prefix needs
                it. It then stays, or moves to one of these tokens (checked on the CPU).

        Raises:
            ValueError: if an argument breaks a rule above. The store is then as it was.
        """
        self.check_tokens(key, value, mask, key_start)
        self.reserve(key.shape[2])
        self.take_up(key, value, mask, key_start)

    def take_up(
        self, key: Tensor, value: Tensor, mask: Tensor | None, key_start: Tensor | None
    ) -> None:
        """`append` tokens that are checked, and for which there is room."""
        new = key.shape[2]
        if new == 0:
            return
        if self.capacity is not None:
            self._columns += new
        with torch.no_grad():
            if self.pattern.prefix:
                self._hold(key, value, mask, key_start)
            if mask is None:
                self._write(key, value)
                self.counts[:2].add_(new)
            else:
                self._write_tokens(key, value, mask)
                self._note_padding(mask)
                self.counts[0].add_(mask.sum(dim=1))
                self.counts[1].add_(new)
            self.counts[2:].copy_(torch.maximum(self.counts[2:], self.counts[:2]))
        self.is_empty = False

    def crop(self, tokens: int) -> None:
        """Take back the last `tokens` tokens of every sequence, padding counted. Reads positions,
        so it waits for the device.

        Raises:
            ValueError: if there are fewer tokens, or if, with those taken back before and not
                replaced since, they are more than `max_rollback`: keys that are needed again would
                be overwritten.
        """
        tokens = checked_int("tokens", tokens, at_least=0)
        fewest = int(self.columns.min())
        if tokens > fewest:
            raise ValueError(f"`tokens` must be at most the {fewest} in the store, got {tokens}")
        padding = self._padding >= (self.columns - tokens)[:, None]
        columns = torch.full_like(self.columns, tokens)
        taken = torch.stack([columns - padding.sum(dim=1), columns])
        behind = self.counts[2:] - self.counts[:2]
        if int((behind + taken).max()) > self.max_rollback:
            before = int(behind.max())
            after = f" after {before} that were taken back before" if before else ""
            raise ValueError(
                f"`tokens` must be at most the store's `max_rollback` = {self.max_rollback}, got "
                f"{tokens}{after}"
            )
        self.counts[:2].sub_(taken)
        self._columns -= tokens
        self._tokens = max(0, self._tokens - tokens)
        self._padding.masked_fill_(padding, -1)

    def reorder(self, rows: Tensor) -> None:
        """Sequence b becomes what sequence `rows[b]` was (beam search), in place; the rows are
        int32 or int64 `[B]`."""
        rows = self._rows(rows, allow_bool=False)
        if rows.shape[0] != self.batch_size:
            raise ValueError(
                f"`rows` must be [B] = [{self.batch_size}], got {list(rows.shape)}: "
                "use `select` to change the batch"
            )
        self.counts.copy_(self.counts[:, rows])
        for tensor in (self.keys, self.values, self.documents, self._padding):
            tensor.copy_(tensor[rows])

    @torch.inference_mode(False)
    def select(self, rows: Tensor) -> None:
        """Keep these sequences alone, in this order. Allocates new memory.

        Args:
            rows: int32 or int64 `[n]`, at least one; or bool `[B]`.
        """
        rows = self._rows(rows, allow_bool=True)
        check_memory(self.layout, self.device, len(rows), self.max_rollback, self._token_bytes)
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.counts = self.counts[:, rows]
        self.documents, self._padding = self.documents[rows], self._padding[rows]

    def repeat(self, times: int) -> None:
        """Copy every sequence `times` times, copies side by side. Allocates new memory."""
        times = checked_int("times", times, at_least=1)
        rows = torch.arange(self.batch_size, device=self.device)
        more = len(rows) * times
        check_memory(self.layout, self.device, more, self.max_rollback, self._token_bytes)
        self.select(rows.repeat_interleave(times))

    def reset(self) -> None:
        """Empty the store, for another text. Keeps the memory."""
        self.counts.zero_()
        self.documents.zero_()
        self._padding.fill_(-1)
        self._columns = self._tokens = 0
        self.is_empty = self.one_document = True

    @torch.inference_mode(False)
    def to(self, device: torch.device | str) -> BandStore:
        """Move everything to another device; returns the store itself."""
        target = as_device(device)
        self.keys, self.values = self.keys.to(target), self.values.to(target)
        self.counts, self._padding = self.counts.to(target), self._padding.to(target)
        self.documents = self.documents.to(target)
        self.layout = self._layout(self.capacity, self.max_rollback, self.device)
        return self

    def gather(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `[B, ..., D]` and values `[B, ..., Dv]` in these slots.

        Args:
            slots: int64 `[B, ...]`; `layout.slots` is the slot of zeros.
        """
        index = self._flat(slots)
        keys, values = (t.flatten(0, 1).index_select(0, index) for t in (self.keys, self.values))
        return keys.unflatten(0, slots.shape), values.unflatten(0, slots.shape)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more tokens, where the capacity is less."""
        if self.capacity is None:
            return
        if in_graph(self.keys):
            raise ValueError(
                "`capacity` must reach as far as the bands in a compiled or captured graph, "
                f"{tokens_in_reach(self.pattern)} tokens, got {self.capacity}"
            )
        if self._columns + tokens > self.capacity:
            self._move(max(self._columns + tokens, 2 * self.capacity), self.max_rollback)

    def set_max_rollback(self, tokens: int) -> None:
        """Change how many tokens `crop` can take back. What is dropped does not come back."""
        tokens = checked_int("tokens", tokens, at_least=0)
        if tokens != self.max_rollback:
            self._move(self.capacity, tokens)

    def check_tokens(
        self,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        key_start: Tensor | None = None,
    ) -> None:
        """Raise `ValueError` unless `append` takes these arguments."""
        check_new_tokens(key, value, mask, (self.keys, self.values), self.num_key_heads)
        if key_start is None:
            return
        check_key_start(key_start, key)
        if self.pattern.prefix and readable(key_start):
            cache_prefix.check_documents(self.stored, key_start, key.shape[2], mask)

    def _layout(self, capacity: int | None, max_rollback: int, device: torch.device) -> RingLayout:
        return ring_layout(
            self.pattern,
            self.num_key_heads,
            max_rollback=max_rollback,
            capacity=capacity,
            device=device,
        )

    def _allocate(
        self,
        capacity: int | None,
        max_rollback: int,
        batch: int,
        dims: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Empty rings of these sizes, in place of others; nothing changes if they do not fit."""
        capacity = capacity_needed(capacity, self.pattern)
        layout = self._layout(capacity, max_rollback, device)
        check_memory(layout, device, batch, max_rollback, sum(dims) * dtype.itemsize)
        keys, values = (
            torch.zeros(batch, layout.slots + 1, dim, dtype=dtype, device=device) for dim in dims
        )
        self.layout, self.capacity, self.max_rollback = layout, capacity, max_rollback
        self.keys, self.values = keys, values
        self.documents = cache_prefix.new_documents(batch, max_rollback, device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _move(self, capacity: int | None, max_rollback: int) -> None:
        """Allocate rings of other lengths and copy what the old ones hold."""
        stored = self.stored._replace(counts=self.counts.clone())
        old, keys, values = self.layout, self.keys, self.values
        last, behind = self.position[:, None] - 1, self.rolled_back[:, None]
        more = max_rollback - self.max_rollback
        dims, batch = (keys.shape[2], values.shape[2]), self.batch_size
        self._allocate(capacity, max_rollback, batch, dims, keys.dtype, keys.device)
        new = self.layout
        for head, (before, after) in enumerate(zip(old.ring_lengths, new.ring_lengths)):
            if not before or self.is_empty:
                continue
            # The position that each slot of the new ring holds: the highest that belongs there.
            place = torch.arange(after, device=self.device)
            at = last - (last - place) % after
            kept = (at >= 0) & (at > last + behind - before)
            slots = sum(old.ring_lengths[:head]) + at % before
            slots = torch.where(kept, slots, old.slots)
            rows = torch.arange(keys.shape[0], device=self.device)[:, None]
            start = sum(new.ring_lengths[:head])
            self.keys[:, start : start + after] = keys[rows, slots]
            self.values[:, start : start + after] = values[rows, slots]
        if not self.is_empty:
            # More room does not bring back what was dropped before, and less room drops more.
            missing = (self.counts[2:] - self.counts[:2] + more).clamp(min=0)
            self.counts[2:] = self.counts[:2] + missing
            if self.pattern.prefix:
                cache_prefix.move(stored, self.stored)
        wider = torch.nn.functional.pad(self._padding, (max(0, more), 0), value=-1)
        self._padding = wider[:, wider.shape[1] - max_rollback :]

    def _hold(
        self, key: Tensor, value: Tensor, mask: Tensor | None, key_start: Tensor | None
    ) -> None:
        """Keep what the prefix needs of these tokens, before the rings overwrite others."""
        self.one_document &= key_start is None
        if not self.one_document:
            cache_prefix.hold(self.stored, key, value, mask, key_start)
            return
        # A graph may run again for a text that is still shorter than the prefix.
        again = in_graph(self.keys)
        if again or self._tokens < self.layout.pattern.prefix:
            empty = self.is_empty and not again
            cache_prefix.hold_first(self.stored, key, value, mask, is_empty=empty)
        if not again:
            self._tokens += cache_prefix.fewest_tokens(key, mask)

    def _write(self, key: Tensor, value: Tensor) -> None:
        """The last of these tokens, as many as each ring holds, from `position` on."""
        new = key.shape[2]
        kernels = kernels_for(key, value)
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
            return
        for group, last in self._groups(new):
            at = self.position[:, None] + torch.arange(new - last, new, device=self.device)
            self._copy(group, key[:, :, new - last :], value[:, :, new - last :], at)

    def _write_tokens(self, key: Tensor, value: Tensor, mask: Tensor) -> None:
        """The same of tokens alone. Padding moves to the left end; in its places the rings keep
        what they hold."""
        new, order = key.shape[2], padding_first(mask)
        key, value = reorder(key, order), reorder(value, order)
        end = self.position + mask.sum(dim=1)
        for group, last in self._groups(new):
            at = end[:, None] + torch.arange(-last, 0, device=self.device)
            is_token = at >= self.position[:, None]
            self._copy(group, key[:, :, new - last :], value[:, :, new - last :], at, is_token)

    def _groups(self, new: int) -> list[tuple[HeadGroup, int]]:
        """Heads to write together, and how many of `new` tokens: no slot is written twice."""
        together = new <= self.layout.live.shortest
        groups = (self.layout.live,) if together else self.layout.by_length
        return [(g, min(new, g.shortest)) for g in groups if min(new, g.shortest) > 0]

    def _copy(
        self,
        group: HeadGroup,
        key: Tensor,
        value: Tensor,
        at: Tensor,
        is_token: Tensor | None = None,
    ) -> None:
        """Tokens `[B, Hkv, m, D]` to positions `[B, m]` of the group's heads, where `is_token`."""
        slots = group.offset[:, None] + at[:, None] % group.length[:, None]  # [B, C, m]
        index = self._flat(slots)
        for buffer, tokens in ((self.keys, key), (self.values, value)):
            tokens = tokens.index_select(1, group.heads)
            flat = buffer.flatten(0, 1)
            if is_token is not None:
                held = flat.index_select(0, index).unflatten(0, slots.shape)
                tokens = torch.where(is_token[:, None, :, None], tokens, held)
            flat.index_copy_(0, index, tokens.reshape(-1, tokens.shape[-1]))

    def _note_padding(self, mask: Tensor) -> None:
        """Remember the latest padding, so that `crop` knows what it takes back."""
        column = self.columns[:, None] + torch.arange(mask.shape[1], device=mask.device)
        both = torch.cat([self._padding, torch.where(mask, -1, column)], dim=1)
        self._padding.copy_(both.sort(dim=1).values[:, mask.shape[1] :])

    def _flat(self, slots: Tensor) -> Tensor:
        rows = torch.arange(self.batch_size, device=self.device) * (self.layout.slots + 1)
        return (slots + rows.view(-1, *(1,) * (slots.dim() - 1))).flatten()

    def _rows(self, rows: Tensor, *, allow_bool: bool) -> Tensor:
        check_rows(rows, self.batch_size, allow_bool=allow_bool)
        rows = rows.to(self.device)
        return rows if rows.dtype == torch.bool else rows.clamp(0, self.batch_size - 1)
