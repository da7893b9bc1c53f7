"""Learned sinks of an attention module: where they are kept, and how they are made."""

from __future__ import annotations

from typing import Any

import torch

# What the operator computes with; storage formats such as float8 are none of these.
COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Sinks(torch.nn.Module):
    """Sinks as a module, the only thing that PEFT can train and save beside its own layers.

    Attributes:
        weight: `[H]`, the parameter that `module.sinks` was.
    """

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self) -> torch.Tensor:
        return self.weight


def current_sinks(module: Any) -> torch.Tensor:
    """The sinks `[H]` that an attention module uses now: its parameter, or under PEFT those of the
    active adapter.
    """
    sinks = module.sinks
    return sinks if isinstance(sinks, torch.Tensor) else sinks()


def new_sinks(module: Any, num_heads: int) -> torch.nn.Parameter:
    """Zeros `[num_heads]`, as `new_parameter` places them."""
    return new_parameter(module, torch.zeros(num_heads))


def new_parameter(module: Any, values: torch.Tensor) -> torch.nn.Parameter:
    """A parameter in the dtype that an attention module computes in, where it runs.

    The weights of an offloaded module are on the meta device while it waits, and quantised weights
    have a dtype of storage. Parameters of a model that is not loaded yet are on PyTorch's default
    device: the meta device while Transformers builds it.

    Args:
        module: the attention module.
        values: of the parameter, on PyTorch's default device or the module's.
    """
    device = _execution_device(module)
    placed = values.to(dtype=_compute_dtype(module), device=device)
    parameter = torch.nn.Parameter(placed)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # Transformers' mark: keep
    return parameter


def _compute_dtype(module: Any) -> torch.dtype:
    named = getattr(module.config, "dtype", None)
    for dtype in (*(parameter.dtype for parameter in module.parameters()), named):
        if dtype in COMPUTE_DTYPES:
            return dtype
    return torch.float32


def _execution_device(module: Any) -> torch.device | str | int | None:
    for parameter in module.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    for child in module.modules():
        hook = getattr(child, "_hf_hook", None)  # Accelerate's, on modules that it offloads
        for part in getattr(hook, "hooks", (hook,)):
            found = getattr(part, "execution_device", None)
            if found is not None:
                return found
    return None
