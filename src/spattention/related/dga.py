"""DGA, Dynamic Group Attention (arXiv:2505.22107v3, ICML 2025): **a reconstruction** from notes on
its algorithm. Neither the paper's text nor its code could be read.

The share gamma of the tokens with the most accumulated attention is focal. The others, in order,
come in groups of m. The query of a group's last token weighs its members, and their weighted sums
are the group's key and value. With `last(G)` the last token of group G, query i sees

    every focal token j <= i,   every group G with last(G) <= i,
    and the members j of the others, j <= i < last(G) ("complementary" tokens),

in one softmax: every past token exactly once. Tokens that fill no group stay as they are.

Unknown, and chosen here: importance is the sum of the attention of `samples` queries, evenly spread
over the sequence, for each head by itself; group keys are means of rotated keys.

**The published form leaks**: later queries decide which earlier tokens are grouped, so an edit
changes earlier outputs, and a loss measured with it may profit from that. Generation keeps what the
prompt was grouped into, and later tokens as they are; the published regrouping after 1.1 m of them,
of which the notes say too little, is left out. So generation with a cache differs from
recomputation.

`block` above 0 is **a causal variant of ours**, not the published method. Tokens come in blocks.
Once a block is whole, the mean attention that its tokens get from the block's own queries decides
which of them are focal, and the others are grouped. Queries of the block itself see its tokens one
by one. So nothing depends on later tokens, and a cache continues it exactly.

Bands are not offered: the members of a group have different distances.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..baselines.adapter import check_integers, check_size
from ..baselines.state import State
from .method import Related, causal_attention, check_number, check_whole


@dataclass(frozen=True)
class DGA(Related):
    """Focal tokens one by one, the others in groups.

    Args:
        num_heads: query heads.
        span: longest input, in tokens.
        group: tokens m of a group.
        share: of focal tokens, gamma, above 0 and at most 1.
        samples: queries that measure importance in the published form.
        block: tokens per block of the causal variant; 0: the published form.
    """

    kind: ClassVar[str] = "dga"
    keeps_state: ClassVar[bool] = True

    group: int = 16
    share: float = 0.1
    samples: int = 64
    block: int = 0

    def __post_init__(self) -> None:
        check_size(self)
        check_integers(
            self.kind,
            group=(self.group, 1, 2**16),
            samples=(self.samples, 1, 2**16),
            block=(self.block, 0, 2**16),
        )
        check_number(self.kind, share=(self.share, 0.0, 1.0))

    def layer(self, index: int, num_layers: int) -> GroupAttention:
        return GroupAttention(self)

    def pairs(self, seq_len: int, num_layers: int) -> int:
        """See `Baseline.pairs`; in the published form as if focal tokens were spread evenly, since
        it depends on the data.
        """
        position = torch.arange(seq_len)
        if self.block:
            focal, groups, loose = self.counts(self.block)
            seen = position // self.block * (focal + groups + loose) + position % self.block + 1
        else:
            others = ((1 - self.share) * (position + 1).double()).long()
            seen = position + 1 - others + others // self.group + others % self.group
        return self.num_heads * int(seen.sum())

    def counts(self, tokens: int) -> tuple[int, int, int]:
        """Focal tokens, groups, and tokens that fill no group, of tokens that are split at once."""
        focal = round(self.share * tokens)
        groups, loose = divmod(tokens - focal, self.group)
        return focal, groups, loose


class Split(NamedTuple):
    """How tokens are split, per head; positions in order.

    Attributes:
        single: `[B, H, F]`, tokens that stay by themselves once their part is split.
        members: `[B, H, G, m]`, tokens of the groups.
        since: `[B, H, G]`, the first query that sees a group in place of its members.
    """

    single: Tensor
    members: Tensor
    since: Tensor


class GroupAttention:
    """The attention of one layer.

    Args:
        method: its groups.
    """

    def __init__(self, method: DGA) -> None:
        self.method = method

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        check_whole("dga", query, key, "groups need the queries of their last tokens")
        key, value = _for_heads(query, key), _for_heads(query, value)
        split = self.split(query, key, scale)
        return self._attend(query, key, value, scale, split)[0]

    def attend_after(
        self, state: State, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """See `StatefulAttention`. A state holds `key`, `value` `[B, H, n, D]` of single tokens and
        groups; in the causal variant also `open_query`, `open_key`, `open_value` of the block that
        is not whole yet.
        """
        key, value = _for_heads(query, key), _for_heads(query, value)
        if self.method.block:
            return self._attend_by_blocks(state, query, key, value, scale)
        if not state.tensors:
            split = self.split(query, key, scale)
            out, groups = self._attend(query, key, value, scale, split)
            kept = [
                torch.cat([_take(t, split.single), g], dim=2) for t, g in zip((key, value), groups)
            ]
        else:
            old = state.tensors["key"], state.tensors["value"]
            kept = [torch.cat(pair, dim=2) for pair in zip(old, (key, value))]
            out = causal_attention(query, kept[0], kept[1], scale)
        state.keep(key=kept[0], value=kept[1])
        return out

    @torch.no_grad()
    def split(self, query: Tensor, key: Tensor, scale: float) -> Split:
        """Choose focal tokens and groups; query and key `[B, H, N, D]`."""
        block, length = self.method.block, query.shape[2]
        if not block:
            single, members = self._split(self.importance(query, key, scale))
            return Split(single, members, members[..., -1])
        whole = length // block
        queries, keys = (
            t[:, :, : whole * block].unflatten(2, (whole, block)) for t in (query, key)
        )
        single, members = self._split(_mean_attention(queries, keys, scale))
        start = block * torch.arange(whole, device=query.device)
        since = (start + block)[:, None].expand(members.shape[:-1])
        last = torch.arange(whole * block, length, device=query.device)
        last = last.expand(*query.shape[:2], -1)
        return Split(
            torch.cat([(single + start[:, None]).flatten(2), last], dim=2),
            (members + start[:, None, None]).flatten(2, 3),
            since.flatten(2),
        )

    def importance(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Attention that each token gets from sampled queries, `[B, H, N]`, in float32 or more."""
        length = query.shape[2]
        count = min(self.method.samples, length)
        rows = torch.linspace(0, length - 1, count, device=query.device).round().long()
        if count == 1:
            rows = rows + length - 1  # the last one, which sees all tokens
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = query[:, :, rows].to(wide) @ key.to(wide).mT * scale
        past = torch.arange(length, device=query.device) <= rows[:, None]
        return scores.masked_fill(~past, -torch.inf).softmax(dim=-1).sum(dim=2)

    def weights(self, query: Tensor, key: Tensor, scale: float, start: int, stop: int) -> Tensor:
        """See `LayerAttention.weights`; a group's weight is shared among its members."""
        query, key = query.float(), _for_heads(query, key).float()
        split = self.split(query, key, scale)
        pooling = _pooling(query, key, split.members, scale)
        pooled = _pool(pooling, key, split.members)
        mask = _mask(split, torch.arange(start, stop, device=key.device), key.shape[2])
        scores = query[:, :, start:stop] @ torch.cat([key, pooled], dim=2).mT * scale
        weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
        found, on_groups = weights[..., : key.shape[2]], weights[..., key.shape[2] :]
        spread = (on_groups[..., None] * pooling[:, :, None]).flatten(3)
        members = split.members.flatten(2)[:, :, None].expand_as(spread)
        return found.scatter_add(3, members, spread)

    def grouped(self, query: Tensor, key: Tensor, scale: float, start: int, stop: int) -> Tensor:
        """The pairs of `weights` that are seen through a group, bool of the same shape."""
        query, key = query.float(), _for_heads(query, key).float()
        split = self.split(query, key, scale)
        rows = torch.arange(start, stop, device=key.device)
        until = _until(split, key.shape[2])
        return until[:, :, None] <= rows[:, None]

    def _split(self, importance: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of single tokens, and of the members of groups, in the last axis."""
        focal, groups, loose = self.method.counts(importance.shape[-1])
        order = importance.argsort(dim=-1, descending=True, stable=True)
        rest = order[..., focal:].sort(dim=-1).values
        members, loose = rest.split(
            [groups * self.method.group, rest.shape[-1] % self.method.group], -1
        )
        single = torch.cat([order[..., :focal], loose], dim=-1).sort(dim=-1).values
        return single, members.unflatten(-1, (groups, self.method.group))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, split: Split
    ) -> tuple[Tensor, list[Tensor]]:
        """The output, and keys and values of the groups `[B, H, G, D]`."""
        pooling = _pooling(query, key, split.members, scale)
        groups = [_pool(pooling, t, split.members) for t in (key, value)]
        mask = _mask(split, torch.arange(query.shape[2], device=query.device), key.shape[2])
        keys, values = (torch.cat(pair, dim=2) for pair in zip((key, value), groups))
        out = scaled_dot_product_attention(query, keys, values, mask, scale=scale)
        return out, groups

    def _attend_by_blocks(
        self, state: State, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """The causal variant, block after block."""
        names, given = ("query", "key", "value"), (query, key, value)
        held = [state.tensors.get(n, t[:, :, :0]) for n, t in zip(names[1:], given[1:])]
        opened = [state.tensors.get(f"open_{n}", t[:, :, :0]) for n, t in zip(names, given)]
        outs, done = [], 0
        while done < query.shape[2]:
            count = min(self.method.block - opened[0].shape[2], query.shape[2] - done)
            part = [t[:, :, done : done + count] for t in given]
            opened = [torch.cat(pair, dim=2) for pair in zip(opened, part)]
            keys, values = (torch.cat(pair, dim=2) for pair in zip(held, opened[1:]))
            outs.append(causal_attention(part[0], keys, values, scale))
            done += count
            if opened[0].shape[2] == self.method.block:
                split = self.split(opened[0], opened[1], scale)
                pooling = _pooling(opened[0], opened[1], split.members, scale)
                held = [
                    torch.cat([old, _take(t, split.single), _pool(pooling, t, split.members)], 2)
                    for old, t in zip(held, opened[1:])
                ]
                opened = [t[:, :, :0] for t in opened]
        state.keep(key=held[0], value=held[1])
        state.keep(**{f"open_{n}": t for n, t in zip(names, opened)})
        return torch.cat(outs, dim=2)


def _for_heads(query: Tensor, tokens: Tensor) -> Tensor:
    """Keys or values with a head for each query head, as the choice differs by query head."""
    return tokens.repeat_interleave(query.shape[1] // tokens.shape[1], dim=1)


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens `[B, H, N, D]` at `index [B, H, ...]`, as `[B, H, ..., D]`."""
    flat = index.flatten(2)[..., None].expand(-1, -1, -1, tokens.shape[-1])
    return tokens.gather(2, flat).unflatten(2, index.shape[2:])


def _mean_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Mean causal attention that tokens get from the queries that see them, `[..., n]`."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ key.to(wide).mT * scale
    past = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    weights = scores.masked_fill(~past, -torch.inf).softmax(dim=-1)
    return weights.sum(dim=-2) / past.sum(dim=-2)


def _pooling(query: Tensor, key: Tensor, members: Tensor, scale: float) -> Tensor:
    """Weights of the members of groups `[B, H, G, m]`, in float32 or more."""
    last = _take(query, members[..., -1])
    scores = (_take(key, members) @ last[..., None])[..., 0] * scale
    return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def _pool(pooling: Tensor, tokens: Tensor, members: Tensor) -> Tensor:
    """Weighted sums of the members of groups, `[B, H, G, D]`."""
    return (pooling.to(tokens.dtype)[..., None, :] @ _take(tokens, members))[..., 0, :]


def _until(split: Split, length: int) -> Tensor:
    """The first query that sees a token's group in its place, `[B, H, length]`."""
    never = split.single.new_full((*split.single.shape[:2], length), length)
    since = split.since[..., None].expand_as(split.members)
    return never.scatter(2, split.members.flatten(2), since.flatten(2))


def _mask(split: Split, rows: Tensor, length: int) -> Tensor:
    """Tokens, then groups, that some queries see: bool `[B, H, rows, length + G]`."""
    rows = rows[:, None]
    token = torch.arange(length, device=rows.device)
    tokens = (token <= rows) & (rows < _until(split, length)[:, :, None])
    return torch.cat([tokens, split.since[:, :, None] <= rows], dim=-1)
