"""RRAttention, round-robin selection of blocks (arXiv:2602.05853v1, Baidu and Peking University,
ACL 2026), for the prefill of a trained model: no training, no parameters.

From the authors' code, PaddlePaddle/PaddleFleet, `Research/RRAttention` (a) and the production
operator `flashmask/rr_attn_*` (b). Strides have S tokens and blocks r = B / S strides. Head h
samples the query at `n S + (h mod S)` of every stride n, so that S heads together look at all
positions:

    X[h, n, c] = q_sampled[h, n] . (sum of the visible keys of stride c) / (sqrt(d) S)
    P = softmax_c(X),   A[h, b, e] = sum of P over the queries of block b and the strides of block e

Each query block keeps its highest blocks until they hold the share tau of its mass: a block is kept
while the blocks before it sum to less than tau. The first block ("sink") and those that causality
or a band cuts are kept anyway, and counted first, as in (a); the last query block keeps all.
Attention within the kept blocks is exact. tau = 1 keeps all blocks.

Keys after the sampled query are left out of the sum of its stride, as in (b); in (a) up to S - 1
of them enter. Sums and scores are float32, where (a) adds in the model's dtype. With bands, only
what a head's bands hold is summed, selected and attended.

**Not causal within a block of queries**: one choice serves its B queries, and a later query of the
block takes part in it. An edit changes no block of queries before its own. So a loss measured with
it, or a model trained with it, may profit from up to B - 1 later tokens.

The prefill is sparse, when there are as many keys as queries. Later tokens, and chunks after the
first, attend all of the past, or their bands. Generation with a cache so differs from
recomputation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from ..bands import BandPattern, in_bands
from ..baselines.adapter import check_integers
from ..baselines.masks import BLOCK as FLEX_BLOCK
from ..baselines.masks import compiled_flex, listed
from ..hf.head_weights import masked_weights
from .method import (
    Related,
    causal_attention,
    causal_pairs,
    causal_weights,
    check_bands,
    check_number,
)

SCORES = 2**27  # of strides at a time, float32


@dataclass(frozen=True)
class RRAttention(Related):
    """Blocks of keys, chosen by sampled queries.

    Args:
        num_heads: query heads.
        span: longest input, in tokens.
        bands: of the heads; None: all of the past is there to be chosen from.
        block: tokens B of a block; on CUDA a multiple of 128, the published size.
        stride: tokens S of a stride, a divisor of `block`.
        tau: share of the estimated mass that is kept, above 0 and at most 1.
        sink: 1 keeps the first block of keys.
        last: 1 lets the last block of queries attend all blocks.
    """

    kind: ClassVar[str] = "rrattention"

    bands: BandPattern | None = None
    block: int = 128
    stride: int = 8
    tau: float = 0.95
    sink: int = 1
    last: int = 1

    def __post_init__(self) -> None:
        check_bands(self, self.bands)
        check_integers(
            self.kind,
            block=(self.block, 1, 2**16),
            stride=(self.stride, 1, self.block),
            sink=(self.sink, 0, 1),
            last=(self.last, 0, 1),
        )
        if self.block % self.stride:
            raise ValueError(
                f"`stride` of `rrattention` must divide `block` = {self.block}, got {self.stride}"
            )
        check_number(self.kind, tau=(self.tau, 0.0, 1.0))

    def layer(self, index: int, num_layers: int) -> RoundRobinAttention:
        return RoundRobinAttention(self)

    def pairs(self, seq_len: int, num_layers: int) -> int:
        """Pairs that could be kept, an upper bound of those attended, which depend on the data."""
        return causal_pairs(self.num_heads, seq_len, self.bands)


class RoundRobinAttention:
    """The attention of one layer.

    Args:
        method: its blocks and bands.
    """

    def __init__(self, method: RRAttention) -> None:
        self.method = method
        self._strides: dict[tuple[int, torch.device], tuple[Tensor, list[int]]] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        method = self.method
        if query.shape[2] != key.shape[2] or method.tau == 1:
            return causal_attention(query, key, value, scale, method.bands)
        kept = self.select(query, key, scale)
        if query.is_cuda:
            if method.block % FLEX_BLOCK:
                raise ValueError(
                    f"`block` of `rrattention` must be a multiple of {FLEX_BLOCK} on CUDA, got "
                    f"{method.block}"
                )
            return self.attend_blocks(query, key, value, scale, kept, flex=compiled_flex)
        rows = torch.arange(query.shape[2], device=query.device)
        mask = self._visible(kept, rows, key.shape[2])
        empty = ~mask.any(dim=-1, keepdim=True)  # SDPA gives NaN where nothing is visible
        out = scaled_dot_product_attention(
            query, key, value, mask | empty, scale=scale, enable_gqa=True
        )
        return out.masked_fill(empty, 0.0)

    def attend_blocks(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        kept: Tensor,
        flex: Any = flex_attention,
    ) -> Tensor:
        """FlexAttention, made of `flex`, over the blocks that `select` kept."""
        length, size = query.shape[2], self.method.block
        bands = self._bands(length)
        whole = kept & self._blocks(length, query.device)[1]
        edges = torch.tensor(bands.flat, device=query.device).unflatten(0, (-1, 4))

        def rule(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
            distance, block = row - column, kept[batch, head, row // size, column // size]
            first = (distance >= edges[head, 0]) & (distance < edges[head, 1])
            second = (distance >= edges[head, 2]) & (distance < edges[head, 3])
            return block & (first | second)

        blocks = BlockMask.from_kv_blocks(
            *listed(kept & ~whole),
            *listed(whole),
            BLOCK_SIZE=size,
            mask_mod=rule,
            seq_lengths=(length, length),
        )
        found: Tensor = flex(query, key, value, block_mask=blocks, scale=scale, enable_gqa=True)
        return found

    @torch.no_grad()
    def select(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """The blocks that each block of queries keeps, bool `[B, H, blocks, blocks]`, True for no
        block without a visible pair; query `[B, H, N, D]`, key `[B, Hkv, N, D]`."""
        method, length = self.method, query.shape[2]
        there, whole = self._blocks(length, query.device)
        forced = there & ~whole
        if method.sink:
            forced[..., 0] |= there[..., 0]
        if method.last:
            forced[..., -1, :] |= there[..., -1, :]
        mass = self.estimate(query, key, scale)
        order = torch.where(forced, torch.inf, mass).argsort(dim=-1, descending=True, stable=True)
        ordered = mass.gather(-1, order)
        before = ordered.cumsum(dim=-1) - ordered
        keep = before < method.tau * mass.sum(dim=-1, keepdim=True)
        kept = torch.zeros_like(keep).scatter_(-1, order, keep & (ordered > 0))
        return (kept | forced) & there

    @torch.no_grad()
    def estimate(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """The mass A of blocks, `[B, H, blocks, blocks]`, in float32 or more; arguments as in
        `select`.
        """
        size, stride, length = self.method.block, self.method.stride, query.shape[2]
        blocks, per_block = -(-length // size), size // stride
        wide = torch.promote_types(query.dtype, torch.float32)
        query, key = (pad(t.to(wide), (0, 0, 0, blocks * size - length)) for t in (query, key))
        heads = torch.arange(query.shape[1], device=query.device)
        offset = heads % stride
        strides = blocks * per_block
        row = torch.arange(strides, device=query.device)
        sampled = query.unflatten(2, (strides, stride))[:, heads, :, offset].transpose(0, 1)
        exists = row * stride + offset[:, None] < length  # [H, strides]
        group = query.shape[1] // key.shape[1]
        key = key.unflatten(2, (strides, stride)).repeat_interleave(group, dim=1)
        sums = key.sum(dim=3)
        step = max(1, SCORES // max(1, sampled.shape[:2].numel() * strides * per_block))
        visible, cut = self._visible_tokens(length, query.device)
        some = visible.any(dim=2)  # [H, strides], by the distance in strides
        found = []
        for start in range(0, blocks, step):
            rows = slice(start * per_block, min(blocks, start + step) * per_block)
            queries, apart = sampled[:, :, rows], row[rows, None] - row
            scores = queries @ sums.mT * (scale / stride)
            for distance in cut:
                # Strides that the query of some head sees in part: those tokens are summed alone.
                inside = row[rows] >= distance
                at = row[rows][inside] - distance
                tokens = visible[:, distance, None, :, None]
                keys = (key[:, :, at] * tokens).sum(dim=3)
                exact = (queries[:, :, inside] * keys).sum(dim=-1) * (scale / stride)
                scores[:, :, inside.nonzero()[:, 0], at] = exact
            seen = some[:, apart.clamp(min=0)] & (apart >= 0) & exists[:, rows, None]
            shares = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1).nan_to_num(0.0)
            shares = shares.unflatten(2, (-1, per_block)).unflatten(4, (-1, per_block))
            found.append(shares.sum(dim=(3, 5)))
        return torch.cat(found, dim=2)

    def weights(self, query: Tensor, key: Tensor, scale: float, start: int, stop: int) -> Tensor:
        """See `LayerAttention.weights`; rows without keys are zero."""
        if self.method.tau == 1:
            return causal_weights(query, key, scale, start, stop, self.method.bands)
        rows = torch.arange(start, stop, device=query.device)
        mask = self._visible(self.select(query, key, scale), rows, key.shape[2])
        return masked_weights(query[:, :, start:stop], key, mask, scale)

    def captured(self, query: Tensor, key: Tensor, scale: float, start: int, stop: int) -> Tensor:
        """Share of attention that the kept blocks hold, `[B, H, stop - start]`, of the rows that
        have keys; arguments as in `LayerAttention.weights`.
        """
        rows = torch.arange(start, stop, device=query.device)
        mask = self._visible(self.select(query, key, scale), rows, key.shape[2])
        weights = causal_weights(query, key, scale, start, stop, self.method.bands)
        return (weights * mask).sum(dim=-1)

    def _bands(self, length: int) -> BandPattern:
        return self.method.bands or BandPattern.dense(self.method.num_heads, length)

    def _blocks(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Blocks with a visible pair, and blocks of visible pairs alone: bool `[H, n, n]`."""
        size = self.method.block
        count = -(-length // size)
        # Distances from 1 - B on, all that pairs of blocks can have.
        distance = torch.arange(1 - size, count * size, device=device)
        inside = in_bands(distance[None], self._bands(length).intervals)[:, 0]  # negative: False
        windows = inside.unfold(1, 2 * size - 1, size)  # [H, n, 2 B - 1]
        apart = torch.arange(count, device=device)
        apart = apart[:, None] - apart
        past, apart = apart >= 0, apart.clamp(min=0)
        return windows.any(dim=2)[:, apart] & past, windows.all(dim=2)[:, apart] & past

    def _visible(self, kept: Tensor, rows: Tensor, key_len: int) -> Tensor:
        """The pairs of some queries that are attended, bool `[B, H, rows, K]`."""
        size = self.method.block
        column = torch.arange(key_len, device=kept.device)
        distance = rows[:, None] - column
        mask = in_bands(distance, self._bands(key_len).intervals)
        return kept[:, :, rows // size][..., column // size] & mask

    def _visible_tokens(self, length: int, device: torch.device) -> tuple[Tensor, list[int]]:
        """The tokens of a stride that the sampled query of each head sees, by the distance in
        strides: bool `[H, strides, S]`; and the distances at which some head sees a part of one.
        """
        if (length, device) not in self._strides:  # the last is kept
            stride, size = self.method.stride, self.method.block
            strides = -(-length // size) * (size // stride)
            distance = stride * torch.arange(strides)[:, None] - torch.arange(stride)
            heads = enumerate(self._bands(length).intervals)
            visible = torch.cat([in_bands(distance + h % stride, (each,)) for h, each in heads])
            cut = (visible.any(dim=2) & ~visible.all(dim=2)).any(dim=0).nonzero()[:, 0]
            self._strides = {(length, device): (visible.to(device), cut.tolist())}
        return self._strides[length, device]
