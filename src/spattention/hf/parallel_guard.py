"""Refuse what splits a row over ranks without the attention layers knowing."""

from __future__ import annotations

from typing import Any

import torch

# While PyTorch's `context_parallel` (or Accelerate's around it) is active, a function of one of
# these modules stands in for `scaled_dot_product_attention`. Nothing else tells.
CONTEXT_PARALLEL = (
    "torch.distributed.tensor.experimental._context_parallel._attention",
    "torch.distributed.tensor.experimental._attention",
)
STOCK = torch._C._nn.scaled_dot_product_attention


def refuse_context_parallel(module: Any, args: tuple[Any, ...]) -> None:
    """A forward pre-hook of attention modules. Each rank would attend its own part of a row only;
    raises `NotImplementedError`.
    """
    attend = torch.nn.functional.scaled_dot_product_attention
    if attend is not STOCK and attend.__module__ in CONTEXT_PARALLEL:
        raise NotImplementedError(
            f'attn_implementation="{module.config._attn_implementation}" must not run under '
            "`context_parallel` (or Accelerate's `maybe_context_parallel`), which gives each rank "
            "a part of every row; give each rank whole rows: data parallelism, FSDP or tensor "
            "parallelism, or for bands `spattention.hf.context_parallel`, which splits rows itself"
        )


def guard_parallel(module: Any) -> None:
    """Have an attention module refuse `context_parallel` in every forward pass."""
    if not any(hook is refuse_context_parallel for hook in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(refuse_context_parallel)
