"""Registration of the PyTorch operators around the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

library = torch.library.Library("spattention", "FRAGMENT")


def register(
    name: str, schema: str, compute: Callable[..., Any], fake: Callable[..., Any]
) -> torch._ops.OpOverload:
    """Register `spattention::name` like `torch.library.custom_op`, without its per-call overhead.

    Args:
        name: the operator's name.
        schema: its arguments and results, `"(Tensor query, ...) -> Tensor"`.
        compute: the function that runs, on CUDA, or on the CPU in Triton's interpreter.
        fake: the function that gives the shapes of the results.
    """
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CUDA", "CPU"):
        library.impl(name, compute, device)
    torch.library.register_fake(f"spattention::{name}", fake, lib=library)
    return getattr(torch.ops.spattention, name).default
