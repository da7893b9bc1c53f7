"""Refuse what splits a row over ranks without the attention layers knowing."""

from __future__ import annotations

from typing import Any

import torch

from ..compat.huggingface import attention_name
from ..compat.pytorch import CONTEXT_PARALLEL_MODULES, STOCK_ATTENTION, has_pre_hook


def refuse_context_parallel(module: Any, args: tuple[Any, ...]) -> None:
    """A forward pre-hook of attention modules. Each rank would attend its own part of a row only;
    raises `NotImplementedError`.
    """
    attend = torch.nn.functional.scaled_dot_product_attention
    if attend is not STOCK_ATTENTION and attend.__module__ in CONTEXT_PARALLEL_MODULES:
        raise NotImplementedError(
            f'attn_implementation="{attention_name(module.config)}" must not run under '
            "`context_parallel` (or Accelerate's `maybe_context_parallel`), which gives each rank "
            "a part of every row; give each rank whole rows: data parallelism, FSDP or tensor "
            "parallelism, or for bands `spattention.hf.context_parallel`, which splits rows itself"
        )


def guard_parallel(module: Any) -> None:
    """Have an attention module refuse `context_parallel` in every forward pass."""
    if not has_pre_hook(module, refuse_context_parallel):
        module.register_forward_pre_hook(refuse_context_parallel)
