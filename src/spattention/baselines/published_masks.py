"""The masks that the paper's published code runs under the names of Longformer, BigBird and
Reformer: simplifications, kept to be compared with, and named as such.

For a span of N tokens, a query at position i and a key at position j, d = i - j >= 0:

    longformer  d <= min(256, N // 4), or j among the first min(16, N // 32) tokens, at least one
    bigbird     d <= min(128, N // 8), or j among the first min(8, N // 64) tokens,
                or d a multiple of max(16, N // 32)
    reformer    positions p of head h lie in bucket (3 p + 13 h + 7) mod n, n = max(2, N // size),
                size = min(64, N // 8); i and j in the same or neighbouring buckets, around a
                circle, or d <= min(8, N // 4)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .adapter import Baseline, check_size
from .masks import MaskAttention, Visible, count_distances

NAMES = ("longformer", "bigbird", "reformer")
ROWS = 256  # of a mask at a time, when pairs are counted


@dataclass(frozen=True)
class PublishedMask(Baseline):
    """One of the published simplified masks, the same in every layer.

    Args:
        num_heads: query heads.
        span: the N of the formulas, and the longest input, in tokens; at least 8.
        mask: "longformer", "bigbird" or "reformer".
    """

    kind: ClassVar[str] = "published_mask"

    mask: str = "longformer"

    def __post_init__(self) -> None:
        check_size(self, least_span=8)
        if self.mask not in NAMES:
            raise ValueError(f"`mask` of `{self.kind}` must be one of {NAMES}, got {self.mask!r}")

    def layer(self, index: int, num_layers: int) -> MaskAttention:
        rule: Visible = getattr(self, f"_{self.mask}")
        return MaskAttention(self.num_heads, lambda device: rule)

    def pairs(self, seq_len: int, num_layers: int) -> int:
        distances = np.arange(self.span)
        if self.mask == "longformer":
            seen = distances[distances <= self._window]
            return self.num_heads * count_distances(seen, self._first, seq_len)
        if self.mask == "bigbird":
            seen = distances[(distances <= self._window) | (distances % self._step == 0)]
            return self.num_heads * count_distances(seen, self._first, seq_len)
        layer, cpu = self.layer(0, num_layers), torch.device("cpu")
        return sum(
            int(layer.dense(min(ROWS, stop), stop, cpu).sum())
            for stop in [*range(seq_len, 0, -ROWS)]
        )

    @property
    def _window(self) -> int:
        span = self.span
        return min(256, span // 4) if self.mask == "longformer" else min(128, span // 8)

    @property
    def _first(self) -> int:
        span = self.span
        return max(1, min(16, span // 32)) if self.mask == "longformer" else min(8, span // 64)

    @property
    def _step(self) -> int:
        return max(16, self.span // 32)

    def _longformer(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (query - key <= self._window) | (key < self._first)
        return seen & (head >= 0)  # all heads alike, one mask for each

    def _bigbird(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query - key
        far = (distance > self._window) & (distance % self._step == 0)
        return ((distance <= self._window) | (key < self._first) | far) & (head >= 0)

    def _reformer(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        count = max(2, self.span // min(64, self.span // 8))
        apart = ((3 * query + 13 * head + 7) % count - (3 * key + 13 * head + 7) % count) % count
        near = (apart == 0) | (apart == 1) | (apart == count - 1)
        return near | (query - key <= min(8, self.span // 4))
