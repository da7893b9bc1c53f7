"""Longformer (Beltagy, Peters and Cohan, 2020, arXiv:2004.05150) as a causal language model.

Windows grow evenly from the lowest layer to the highest; in the upper half of the layers a few
heads look at every 2nd, 3rd or 4th token instead (section 4.1); the first tokens are global. The
paper's language models have no global tokens (`global_tokens=0`). Its separate projections for
global tokens are left out: at the start of a causal sequence they change those tokens' own outputs
alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .adapter import Baseline, check_integers, check_size
from .masks import MaskAttention, Visible, count_distances


@dataclass(frozen=True)
class Longformer(Baseline):
    """Sliding windows per layer, dilated heads, global tokens.

    Args:
        num_heads: query heads.
        span: longest input, in tokens.
        narrow: window of the lowest layer in tokens, the query itself included; default `span / 32`
            (the paper's 32 at 1,024).
        wide: window of the highest layer; default `span / 2` (the paper's 512 at 1,024). A model
            of one layer has this one.
        dilated_heads: how many heads, the last ones, are dilated in the upper half of the layers;
            default 2 as in the paper, at most half of the heads.
        largest_step: distance between the tokens that a dilated head of the highest layer sees;
            the upper half of the layers rises from 2 to it in even parts (fewer layers than that
            takes stay below it). Dilated windows hold as many tokens as the others. 1: no dilation.
        global_tokens: first tokens that every later one sees; default `span / 32`, 1 to 16.
    """

    kind: ClassVar[str] = "longformer"

    narrow: int = None  # type: ignore[assignment]  # resolved below
    wide: int = None  # type: ignore[assignment]  # resolved below
    dilated_heads: int = None  # type: ignore[assignment]  # resolved below
    largest_step: int = 4
    global_tokens: int = None  # type: ignore[assignment]  # resolved below

    def __post_init__(self) -> None:
        check_size(self)
        heads, span = self.num_heads, self.span
        for name, default in (
            ("narrow", max(1, span // 32)),
            ("wide", max(1, span // 2)),
            ("dilated_heads", min(2, heads // 2)),
            ("global_tokens", min(16, max(1, span // 32))),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        check_integers(
            self.kind,
            wide=(self.wide, 1, span),
            narrow=(self.narrow, 1, self.wide),
            dilated_heads=(self.dilated_heads, 0, heads),
            largest_step=(self.largest_step, 1, span),
            global_tokens=(self.global_tokens, 0, span),
        )

    def window(self, index: int, num_layers: int) -> int:
        """Tokens that a head of this layer sees."""
        share = index / (num_layers - 1) if num_layers > 1 else 1.0
        return round(self.narrow + (self.wide - self.narrow) * share)

    def steps(self, index: int, num_layers: int) -> list[int]:
        """Per head, the distance between the tokens that it sees; 1: no dilation."""
        above, upper = index - num_layers // 2, num_layers - num_layers // 2
        step = 1
        if above >= 0 and num_layers > 1 and self.largest_step > 1:
            step = 2 + above * (self.largest_step - 1) // upper
        return [1] * (self.num_heads - self.dilated_heads) + [step] * self.dilated_heads

    def layer(self, index: int, num_layers: int) -> MaskAttention:
        # In tensors, also the window: compiled layers that differ in a number share no graph.
        steps = torch.tensor(self.steps(index, num_layers), device="cpu")
        reaches = steps * self.window(index, num_layers)
        first = self.global_tokens

        def make(device: torch.device) -> Visible:
            step, reach = steps.to(device), reaches.to(device)

            def visible(head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                distance = query - key
                near = (distance < reach[head]) & (distance % step[head] == 0)
                return near | (key < first)

            return visible

        return MaskAttention(self.num_heads, make)

    def pairs(self, seq_len: int, num_layers: int) -> int:
        total = 0
        for index in range(num_layers):
            window = self.window(index, num_layers)
            for step in self.steps(index, num_layers):
                seen = np.arange(window) * step
                total += count_distances(seen, self.global_tokens, seq_len)
        return round(total / num_layers)
