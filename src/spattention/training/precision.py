"""bfloat16 products with float32 weights, gradients and optimizer state, on one device.

The model's parameters become bfloat16, so that every product reads bfloat16, the experts' among
them, which autocast leaves in float32. Their float32 values, the masters, are the parameters of a
plain `torch.optim.AdamW`; hooks hand it the gradients before a step and round its result into the
model after it. Gradients are accumulated in float32 (`Tensor.grad_dtype`). 18 bytes a parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from ..compat.pytorch import copy_each

MASTERS = "masters"  # entry of the optimizer's state dict


def sharded_precision(precision: str) -> MixedPrecisionPolicy:
    """The mixed-precision policy of FSDP2; gradients are summed in float32 under each.

    Accelerate's own policy for bfloat16 would sum the gradients over devices and passes in bfloat16
    too, and round the loss to it.

    Args:
        precision: dtype of the products, "float32" or "bfloat16".
    """
    if precision == "float32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def groups(named: Sequence[tuple[str, torch.Tensor]], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: tensors of two and more dimensions decay, norms and sinks do not."""
    return [
        {"params": [p for _, p in named if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]


def to_bfloat16(model: torch.nn.Module, weight_decay: float, **adamw: Any) -> torch.optim.AdamW:
    """Turn a float32 model's parameters into bfloat16, in place, and make their optimizer.

    Args:
        model: on the device where it is trained; its buffers stay as they are.
        weight_decay: decay of tensors with at least two dimensions.
        adamw: `lr`, `betas`, `eps` of `torch.optim.AdamW`.

    Returns:
        An AdamW over the float32 masters. Its state dict holds them too, so that what resumes from
        it continues exactly; loading one into it restores masters and model.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    masters = [(name, torch.nn.Parameter(p.detach())) for name, p in named]
    for _, parameter in named:
        parameter.data = parameter.data.to(torch.bfloat16)
        parameter.grad_dtype = torch.float32
    rounded: list[torch.Tensor] = [p for _, p in named]
    exact: list[torch.Tensor] = [p for _, p in masters]
    optimizer = torch.optim.AdamW(
        [group for group in groups(masters, weight_decay) if group["params"]], fused=True, **adamw
    )

    def take_gradients(*_: Any) -> None:
        for parameter, master in zip(rounded, exact):
            master.grad = parameter.grad

    @torch.no_grad()
    def round_into_model(*_: Any) -> None:
        copy_each(rounded, exact)
        for master in exact:
            master.grad = None

    def save_masters(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, MASTERS: {name: p.detach() for name, p in masters}}

    @torch.no_grad()
    def load_masters(_: Any, state: dict[str, Any]) -> None:
        found = state.get(MASTERS)
        if found is None or found.keys() != {name for name, _ in masters}:
            raise ValueError(
                "the optimizer's state must hold the float32 weights of this model: was the "
                "checkpoint written with `precision` bfloat16?"
            )
        for name, master in masters:
            master.copy_(found[name])
        copy_each(rounded, exact)

    optimizer.register_step_pre_hook(take_gradients)
    optimizer.register_step_post_hook(round_into_model)
    optimizer.register_state_dict_post_hook(save_masters)
    optimizer.register_load_state_dict_pre_hook(load_masters)
    return optimizer
