"""BigBird (Zaheer et al., 2020, arXiv:2007.14062) as a causal language model.

Tokens lie in blocks. A query sees its own block and the ones before it (window), the first blocks
(global) and, per head, a few blocks drawn at random among those between, with a fixed seed: the
paper's internal transformer construction (ITC), of which only the past is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .adapter import Baseline, check_integers, check_size
from .masks import MaskAttention, Visible

MAX_BLOCKS = 4096  # of a row: each layer has a table of blocks by blocks for every head


@dataclass(frozen=True)
class BigBird(Baseline):
    """Window, global and random blocks.

    Args:
        num_heads: query heads.
        span: longest input, in tokens.
        block: tokens per block; default 64 as in the paper, and less below the 4,096 tokens that
            it was made for (`span / 64`), so that a token sees as large a share.
        window: blocks of the window, the query's own included; the paper's 3, all of them at or
            before the query here.
        global_blocks: first blocks that every token sees.
        random: blocks that each head draws per block of queries, among those that are neither
            window nor global; all of them where there are fewer.
        seed: of the draws; layers and heads draw differently.
    """

    kind: ClassVar[str] = "bigbird"

    block: int = None  # type: ignore[assignment]  # resolved below
    window: int = 3
    global_blocks: int = 2
    random: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        check_size(self)
        span = self.span
        if self.block is None:
            object.__setattr__(self, "block", min(64, max(1, span // 64)))
        check_integers(
            self.kind,
            block=(self.block, 1, span),
            window=(self.window, 1, span),
            global_blocks=(self.global_blocks, 0, span),
            random=(self.random, 0, span),
            seed=(self.seed, 0, 2**32 - 1),
        )
        if -(-span // self.block) > MAX_BLOCKS:
            raise ValueError(
                f"`block` of `{self.kind}` must cut `span` = {span} into at most {MAX_BLOCKS} "
                f"blocks, got {self.block}"
            )

    def blocks(self, index: int) -> Tensor:
        """Which blocks of keys each block of queries sees in layer `index`: bool `[H, n, n]`."""
        count = -(-self.span // self.block)
        key = torch.arange(count, device="cpu")  # also where models are built on no device
        query = key[:, None]
        past = key <= query
        kept = past & ((query - key < self.window) | (key < self.global_blocks))
        rest = (past & ~kept).expand(self.num_heads, -1, -1)
        # A model may be built under another default dtype, which would draw other numbers.
        generator = torch.Generator("cpu").manual_seed(self.seed * 2**20 + index)
        size = (self.num_heads, count, count)
        draws = torch.rand(size, generator=generator, dtype=torch.float32, device="cpu")
        ranks = draws.masked_fill(~rest, 2.0).argsort(dim=-1).argsort(dim=-1)
        return kept | (rest & (ranks < self.random))

    def layer(self, index: int, num_layers: int) -> MaskAttention:
        size, blocks = self.block, self.blocks(index)

        def make(device: torch.device) -> Visible:
            table = blocks.to(device)

            def visible(head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return table[head, query // size, key // size]

            return visible

        return MaskAttention(self.num_heads, make)

    def pairs(self, seq_len: int, num_layers: int) -> int:
        count = -(-self.span // self.block)
        starts = torch.arange(count) * self.block
        sizes = (seq_len - starts).clamp(0, self.block)  # tokens of each block that are there
        both = sizes[:, None] * sizes
        both.diagonal().copy_(sizes * (sizes + 1) // 2)
        # Layers differ in which blocks they draw, not in how many.
        return int((self.blocks(0) * both).sum())
