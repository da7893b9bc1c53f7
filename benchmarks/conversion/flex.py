"""Bands with a prefix through PyTorch's FlexAttention: another implementation of the same masks.

    attend(model, patterns, sinks)      # in place of `spattention.hf.apply`

It is here to measure rows where no kernel of the library knows prefixes, and to compare with. On a
GPU FlexAttention is compiled; elsewhere it makes all weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from spattention.bands import BandPattern

NAME = "bands_by_flex"
SHAPES = 64  # compiled variants: batches, lengths, with gradients and without


class Plan:
    """The mask of one layer, and its blocks by length."""

    def __init__(self, pattern: BandPattern, device: torch.device) -> None:
        def column(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        flat = pattern.flat
        near, far, near2, far2 = (column(flat[k::4]) for k in range(4))
        attends = torch.tensor([bool(head) for head in pattern.intervals], device=device)
        prefix = column([pattern.prefix] * pattern.num_heads) * attends
        self.heads, self.device = pattern.num_heads, device
        self.mask = _mask_mod(near, far, near2, far2, prefix)
        self._blocks: dict[int, Any] = {}

    def blocks(self, length: int) -> Any:
        """The block mask of causal self-attention over `length` tokens."""
        if length not in self._blocks:
            self._blocks[length] = create_block_mask(
                self.mask, None, self.heads, length, length, device=str(self.device)
            )
        return self._blocks[length]

    def rows(self, queries: int, keys: int) -> Tensor:
        """The mask of the last queries, bool `[H, queries, keys]`."""
        head = torch.arange(self.heads, device=self.device)[:, None, None]
        query = torch.arange(keys - queries, keys, device=self.device)[:, None]
        return self.mask(None, head, query, torch.arange(keys, device=self.device))


def attend(model: Any, patterns: Sequence[BandPattern], sinks: Sequence[Tensor] | None) -> None:
    """Give the attention modules of a model their masks and, if given, sinks `[H]` per layer."""
    ALL_ATTENTION_FUNCTIONS[NAME] = _forward
    ALL_MASK_ATTENTION_FUNCTIONS[NAME] = _no_mask
    for layer, module in enumerate(each.self_attn for each in model.model.layers):
        weight = module.q_proj.weight
        module.plan = Plan(patterns[layer], weight.device)
        module.sinks = None
        if sinks is not None:
            module.sinks = torch.nn.Parameter(sinks[layer].to(weight))
    model.set_attn_implementation(NAME)


def _forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    queries, keys = query.shape[2], key.shape[2]
    by_hand = query.device.type == "cpu" and torch.is_grad_enabled()  # Flex has no gradients there
    if queries != keys or by_hand:
        return _by_mask(module, query, key, value, scaling).transpose(1, 2), None
    out, aux = _flex(query.device.type)(
        query,
        key,
        value,
        block_mask=module.plan.blocks(keys),
        scale=scaling,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    if module.sinks is not None:  # the share that a sink takes from the keys
        out = out * torch.sigmoid(aux.lse - module.sinks.float()[:, None])[..., None].to(out.dtype)
    return out.transpose(1, 2), None


def _by_mask(module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Attention of the last queries, all weights at once."""
    group = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(group, dim=1) for each in (key, value))
    scores = (query @ key.mT).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
    seen = module.plan.rows(query.shape[2], key.shape[2])
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if module.sinks is not None:
        column = module.sinks.float()[:, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    weights = weights.masked_fill(~seen, 0.0)  # rows that see nothing
    return weights.to(value.dtype) @ value


def _mask_mod(near: Tensor, far: Tensor, near2: Tensor, far2: Tensor, prefix: Tensor) -> Any:
    def seen(_: Any, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query - key
        first = (distance >= near[head]) & (distance < far[head])
        second = (distance >= near2[head]) & (distance < far2[head])
        return (first | second | (key < prefix[head])) & (distance >= 0)

    return seen


@cache
def _flex(device: str) -> Any:
    if device != "cuda":
        return flex_attention
    torch._dynamo.config.recompile_limit = SHAPES
    return torch.compile(flex_attention, dynamic=False)


def _no_mask(*_: Any, **__: Any) -> None:
    """No mask at all: rows are whole texts of one length."""
