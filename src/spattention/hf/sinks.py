"""Learned sinks of an attention module: where they are kept, and how they are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..compat.huggingface import keep_initial_value, offload_hook
from ..scalars import as_number, has_values, shown_number

# What the operator computes with; storage formats such as float8 are none of these.
LARGEST_SINK = 65504  # of float16
COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Sinks(torch.nn.Module):
    """Sinks `[H]` as a module, all that PEFT can train and save beside its own layers."""

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


def new_parameter(module: Any, values: torch.Tensor) -> torch.nn.Parameter:
    """A parameter of these values in the dtype that an attention module computes in, where it runs.
    The weights of an offloaded module are on the meta device while it waits, and quantised weights
    have a dtype of storage. Parameters of a model that is not loaded yet are on PyTorch's default
    device: the meta device while Transformers builds it."""
    device = execution_device(module)
    placed = values.to(dtype=_compute_dtype(module), device=device)
    parameter = torch.nn.Parameter(placed)
    keep_initial_value(parameter)
    return parameter


def sink_values(
    sinks: bool | float | Sequence[torch.Tensor | None], layers: Sequence[int], heads: Sequence[int]
) -> list[torch.Tensor | None]:
    """Values that sinks start from: per layer in question `[H]`, or None to keep what is there.

    Args:
        sinks: as `apply` takes it, except False.
        layers: indices of the layers in question.
        heads: query heads of each of them; 0 for a layer without a pattern.

    Raises:
        ValueError: if the values are not numbers that float16 holds, or not one tensor `[H]` per
            layer.
    """
    if sinks is True:
        return [None] * len(layers)
    number = as_number(sinks)
    if number is not None:
        if not abs(number) <= LARGEST_SINK:
            raise ValueError(
                f"`sinks` must be from -{LARGEST_SINK} to {LARGEST_SINK}, got {shown_number(sinks)}"
            )
        return [torch.full((count,), float(number)) if count else None for count in heads]
    if isinstance(sinks, torch.Tensor | str) or not isinstance(sinks, Sequence):
        raise ValueError(
            "`sinks` must be True, False, a number, or one tensor [H] per layer, got "
            f"{type(sinks).__name__}"
        )
    if len(sinks) != len(layers):
        raise ValueError(f"`sinks` must be one per layer, {len(layers)}, got {len(sinks)}")
    found: list[torch.Tensor | None] = []
    for layer, count, values in zip(layers, heads, sinks):
        if not count and values is None:
            found.append(None)
            continue
        where = f"`sinks` of layer {layer}"
        if not count:
            raise ValueError(f"{where} must be None, since it has no pattern, got values")
        if not isinstance(values, torch.Tensor) or not values.dtype.is_floating_point:
            kind = values.dtype if isinstance(values, torch.Tensor) else type(values).__name__
            raise ValueError(f"{where} must be a tensor of floating point, got {kind}")
        if values.dtype not in COMPUTE_DTYPES or not has_values(values):
            raise ValueError(
                f"{where} must be a dense tensor with values, of a dtype that computes, got "
                f"{values.dtype}, {values.layout}, on {values.device}"
            )
        if tuple(values.shape) != (count,):
            raise ValueError(f"{where} must have the shape [{count}], got {list(values.shape)}")
        if not bool((values.abs() <= LARGEST_SINK).all()):
            raise ValueError(
                f"{where} must be from -{LARGEST_SINK} to {LARGEST_SINK}, got {values.tolist()}"
            )
        found.append(values.detach())
    return found


def _compute_dtype(module: Any) -> torch.dtype:
    named = getattr(module.config, "dtype", None)
    for dtype in (*(parameter.dtype for parameter in module.parameters()), named):
        if dtype in COMPUTE_DTYPES:
            return dtype
    return torch.float32


def execution_device(module: Any) -> torch.device | str | int | None:
    """The device that an attention module runs on; None if it is not known yet."""
    for parameter in module.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    for child in module.modules():
        hook = offload_hook(child)
        for part in getattr(hook, "hooks", (hook,)):
            found = getattr(part, "execution_device", None)
            if found is not None:
                return found
    return None
