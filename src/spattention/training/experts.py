"""Layers of one expert, which every token visits: plain products.

Transformers sorts tokens by expert and multiplies in groups. With one expert that moves each token
twice for nothing, and counts by a histogram that reads its bounds from the GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

NAME = "spattention_one_expert"


def one_expert(
    experts: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The experts' result `[T, D]` where there is one.

    Args:
        experts: the module, an `OlmoeExperts`.
        hidden: `[T, D]`.
        chosen: `[T, 1]`, all 0.
        weights: `[T, 1]`, the router's.
    """
    gate, up = F.linear(hidden, experts.gate_up_proj.squeeze(0)).chunk(2, dim=-1)
    out = F.linear(experts.act_fn(gate) * up, experts.down_proj.squeeze(0))
    return (out * weights).to(hidden.dtype)


def simplify_experts(model: Any) -> None:
    """Let a model whose layers have one expert each run it by itself, in place."""
    experts = [module for module in model.modules() if type(module) is OlmoeExperts]
    if experts and all(each.num_experts == 1 for each in experts):
        ALL_EXPERTS_FUNCTIONS.register(NAME, one_expert)
        model.set_experts_implementation(NAME)
