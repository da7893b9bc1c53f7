"""Attention under a formula: compiled FlexAttention on CUDA, a dense mask elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ..compat.pytorch import recompile_limit
from ..hf.head_weights import masked_weights

# (head, query position, key position) -> bool; integer tensors that broadcast. Causality is added.
Visible = Callable[[Tensor, Tensor, Tensor], Tensor]
BLOCK = 128  # of FlexAttention's block mask
SHORT = 2048  # tokens whose dense masks are small; without gradients they need nothing compiled
SHAPES = 256  # that FlexAttention is compiled for in one process

# Compiled at the first call. Without `fullgraph`, a call too many would run uncompiled, N x N.
_compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)


def compiled_flex(*arguments: Any, **keywords: Any) -> Any:
    """Compiled FlexAttention. Each shape is a graph, and evaluation asks for more than PyTorch's
    limit of 8; code that is itself compiled has taken `_compiled` in.
    """
    if torch.compiler.is_compiling():
        return _compiled(*arguments, **keywords)
    with recompile_limit(SHAPES):
        return _compiled(*arguments, **keywords)


class MaskAttention:
    """The attention of one layer whose heads see what a formula says, and never the future.

    Args:
        num_heads: query heads H.
        make: gives the formula with its tables on a device.

    Whole sequences on CUDA run compiled FlexAttention, except for those of at most 2,048 tokens
    without gradients; these and everything else run PyTorch's `scaled_dot_product_attention` under
    a dense mask.
    """

    def __init__(self, num_heads: int, make: Callable[[torch.device], Visible]) -> None:
        self.num_heads = num_heads
        self.make = make
        self._blocks: dict[tuple[torch.device, int], BlockMask] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        small = key.shape[2] <= SHORT and not torch.is_grad_enabled()
        if query.is_cuda and query.shape[2] == key.shape[2] and not small:
            return self.attend_blocks(query, key, value, scale, flex=compiled_flex)
        mask = self.dense(query.shape[2], key.shape[2], query.device)
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )

    def attend_blocks(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        flex: Callable[..., Any] = flex_attention,
    ) -> Tensor:
        """Whole sequences by FlexAttention, made of `flex`."""
        mask = self.block_mask(query.shape[2], query.device)
        return flex(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)

    def weights(self, query: Tensor, key: Tensor, scale: float, start: int, stop: int) -> Tensor:
        mask = self._rows(range(start, stop), key.shape[2], query.device)
        return masked_weights(query[:, :, start:stop], key, mask, scale)

    def dense(self, query_len: int, key_len: int, device: torch.device) -> Tensor:
        """The mask of the last `query_len` of `key_len` positions, bool `[H, Q, K]`."""
        return self._rows(range(key_len - query_len, key_len), key_len, device)

    def block_mask(self, length: int, device: torch.device) -> BlockMask:
        """FlexAttention's block mask of a whole sequence, made once, one strip of blocks at a time:
        never H x N x N.
        """
        if (device, length) not in self._blocks:
            self._blocks = {(device, length): self._make_blocks(length, device)}  # the last is kept
        return self._blocks[device, length]

    def _make_blocks(self, length: int, device: torch.device) -> BlockMask:
        columns = -(-length // BLOCK)
        some, every = [], []
        for start in range(0, length, BLOCK):
            rows = self._rows(range(start, min(start + BLOCK, length)), length, device)
            padded = torch.nn.functional.pad(rows, (0, columns * BLOCK - length))
            cells = padded.unflatten(2, (columns, BLOCK))  # [H, rows, columns, BLOCK]
            some.append(cells.any(dim=3).any(dim=1))
            # Blocks that stick out over the end are never whole.
            every.append(cells.all(dim=3).all(dim=1) & (rows.shape[1] == BLOCK))
        whole = torch.stack(every, dim=1)[None]  # [1, H, rows of blocks, columns]
        partial = torch.stack(some, dim=1)[None] & ~whole
        visible = self.make(device)

        def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return visible(head, query, key) & (key <= query)

        return BlockMask.from_kv_blocks(
            *listed(partial),
            *listed(whole),
            BLOCK_SIZE=BLOCK,
            mask_mod=rule,
            seq_lengths=(length, length),
        )

    def _rows(self, positions: range, key_len: int, device: torch.device) -> Tensor:
        head = torch.arange(self.num_heads, device=device)[:, None, None]
        query = torch.arange(positions.start, positions.stop, device=device)[:, None]
        key = torch.arange(key_len, device=device)
        return self.make(device)(head, query, key) & (key <= query)


def count_distances(distances: np.ndarray, first: int, seq_len: int) -> int:
    """Causal pairs of one head that sees some increasing distances, 0 among them, and the first
    `first` tokens."""
    near = distances[distances < seq_len]
    shared = np.arange(min(first, seq_len))
    # Of the n - k queries from key k on, those at a distance seen are counted already.
    seen = np.searchsorted(near, seq_len - 1 - shared, side="right")
    return int((seq_len - near).sum() + (seq_len - shared - seen).sum())


def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are set, and their columns first: int32."""
    columns = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32), columns.to(torch.int32)
