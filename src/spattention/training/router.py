"""OLMoE's auxiliary losses of the router, taken layer by layer.

OLMoE (Muennighoff et al., arXiv:2409.02060, section 2) adds two losses to the cross-entropy, means
over layers:

    balance = E * sum_e f_e * p_e       f_e: share of the choices that expert e got
                                        p_e: mean probability that the router gives it; 1 when even
    z       = mean over tokens of logsumexp(router logits)^2

Transformers' `output_router_logits` pools all layers before it multiplies, so that one layer may
make up for another, has no z-loss, and collects logits by hooks that compiled or checkpointed
layers do not bear. Here each router attaches the gradient of its own losses to its result.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter


class BalancedRouter(OlmoeTopKRouter):
    """The router of one layer, with its losses.

    Attributes:
        balance, z: float32 `[]`, the losses of the last forward pass in training.
        balance_weight, z_weight: what their gradients are multiplied by.
    """

    balance: torch.Tensor
    z: torch.Tensor

    def __init__(self, config: Any, balance_weight: float, z_weight: float) -> None:
        super().__init__(config)
        self.balance_weight = balance_weight
        self.z_weight = z_weight
        self.register_buffer("balance", torch.zeros(()), persistent=False)
        self.register_buffer("z", torch.zeros(()), persistent=False)

    def forward(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, scores, chosen = super().forward(hidden_states)
        if self.training and torch.is_grad_enabled():
            balance = balance_loss(logits, chosen)
            z = torch.logsumexp(logits.float(), dim=-1).square().mean()
            self.balance.copy_(balance.detach())
            self.z.copy_(z.detach())
            scores = _Attach.apply(scores, self.balance_weight * balance + self.z_weight * z)
        return logits, scores, chosen


def balance_loss(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The balance loss of one layer.

    Args:
        logits: `[T, E]`.
        chosen: `[T, K]`, the experts of each token.

    Returns:
        float32 `[]`.
    """
    experts = logits.shape[-1]
    # `histc` takes floats on the CPU, and is exact for integers on CUDA.
    choices = chosen.flatten().float() if chosen.device.type == "cpu" else chosen.flatten().int()
    # Equal bounds would be read from the GPU.
    shares = torch.histc(choices, experts, 0, max(1, experts - 1)).float() / chosen.numel()
    return experts * (shares * logits.float().softmax(dim=-1).mean(dim=0)).sum()


def balance_routers(model: torch.nn.Module, balance: float, z: float, passes: int) -> None:
    """Give every OLMoE router its losses, in place; a model without routers stays as it is.

    Args:
        model: with or without routers.
        balance: weight of the balance loss in the loss of a step.
        z: weight of the z-loss.
        passes: forward passes per step, whose gradients add up.

    Raises:
        ValueError: if the model has routers of another kind and a weight is not 0.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is OlmoeTopKRouter
    ]
    if not found and (balance or z) and any(".experts." in n for n, _ in model.named_parameters()):
        raise ValueError(
            f"`balance_loss` and `z_loss` must be 0 for {type(model).__name__}, whose routers are "
            f"not OLMoE's, got {balance} and {z}"
        )
    share = 1 / (max(1, len(found)) * passes)
    for parent, name, old in found:
        with torch.device("meta"):  # its weight is the old one's
            new = BalancedRouter(model.config, balance * share, z * share)
        weight = old.weight
        assert isinstance(weight, torch.nn.Parameter)
        new.balance, new.z = (torch.zeros((), device=weight.device) for _ in range(2))
        new.weight = weight
        setattr(parent, name, new)


def router_losses(model: torch.nn.Module) -> dict[str, float]:
    """Means over layers of the last pass's losses; empty without routers. Reads values."""
    routers = [module for module in model.modules() if isinstance(module, BalancedRouter)]
    if not routers:
        return {}
    found = torch.stack([torch.stack((r.balance, r.z)) for r in routers]).mean(0).tolist()
    return {"balance_loss": found[0], "z_loss": found[1]}


class _Attach(torch.autograd.Function):
    """Passes a tensor on, and in the backward pass gives `loss` the gradient 1."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient, torch.ones((), dtype=torch.float32, device=gradient.device)
