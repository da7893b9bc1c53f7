"""Tensor parallelism: which heads of a layer this rank has, and heads dealt for equal work.

Transformers' `tp_plan="auto"` cuts the query, key and value projections of Llama and its kin into
consecutive heads. A layer's pattern stays that of all heads, in the config and in the model; each
rank attends with its part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist

from ..bands import BandPattern
from ..parallel import deal as deal_groups
from ..parallel import deal_heads, deal_pattern, undeal_heads
from .dealable import ORDER, by_heads, check_dealable, refuse_changed
from .decoder import attention_modules, key_heads, plan_of, text_config_of


@dataclass(frozen=True)
class HeadShard:
    """This rank's place among the ranks that share a layer's heads, and the layer's key/value heads
    on all of them."""

    rank: int
    ranks: int
    key_heads: int
    group: Any

    def for_key_heads(self, pattern: BandPattern, key_heads: int) -> BandPattern:
        """The pattern of this rank's query heads, where it has `key_heads` of the layer's."""
        if key_heads * self.ranks != self.key_heads:
            return pattern
        return self.part(pattern, pattern.num_heads // self.ranks)

    def part(self, pattern: BandPattern, heads: int) -> BandPattern:
        """The pattern of this rank's query heads, of which it has `heads`."""
        return _heads(pattern, self.rank * heads, (self.rank + 1) * heads)

    def sinks(self, sinks: torch.Tensor, heads: int) -> torch.Tensor:
        """The sinks of this rank's query heads. Their gradients are those of all ranks' heads."""
        return _Part.apply(sinks, self.rank * heads, heads, self.group)


def head_shard(module: torch.nn.Module) -> HeadShard | None:
    """The place of this rank, if the projections of an attention module are distributed."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    from torch.distributed.tensor import DTensor

    for parameter in module.parameters():
        if isinstance(parameter, DTensor) and any(p.is_shard() for p in parameter.placements):
            mesh = parameter.device_mesh
            if mesh.ndim > 1:
                continue
            heads = key_heads(module.config)
            return HeadShard(mesh.get_local_rank(), mesh.size(), heads, mesh.get_group())
    return None


@lru_cache(maxsize=1024)
def _heads(pattern: BandPattern, start: int, stop: int) -> BandPattern:
    return pattern.heads(start, stop)


class _Part(torch.autograd.Function):
    """Sinks of some heads; the gradient of all heads on every rank."""

    @staticmethod
    def forward(ctx: Any, sinks: torch.Tensor, first: int, heads: int, group: Any) -> torch.Tensor:
        ctx.rest = sinks.shape[0], first, group
        return sinks[first : first + heads].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        heads, first, group = ctx.rest
        whole = gradient.new_zeros(heads)
        whole[first : first + len(gradient)] = gradient
        dist.all_reduce(whole, group=group)
        return whole, None, None, None


def deal(model: Any, ranks: int) -> Any:
    """Deal the heads of every layer with bands, so that tensor-parallel ranks have equal work.

    Weights of the query, key, value and output projections change their order in place, by whole
    key/value heads, and so do the bands that go with them. Results stay the same; only rounding may
    differ. A layer with anything that is not known to allow that is refused. Weights may be whole
    or distributed already. The order is never stored: `state_dict` and `save_pretrained` give
    weights in their natural order, which `load_state_dict` takes, and the config keeps its
    patterns. State of an optimizer follows the weights in memory: make the optimizer afterwards.

    Args:
        model: a model in which `spattention.hf.apply` gave layers a pattern.
        ranks: number of tensor-parallel ranks; 1 restores the natural order.

    Returns:
        The same model.

    Raises:
        ValueError: if ranks do not divide the key/value heads of a layer, a layer has no separate,
            plain linear projections `q_proj`, `k_proj`, `v_proj` and `o_proj`, it has another
            parameter whose heads are not known (as DiffLlama's), or the model has adapters.
    """
    text_config = text_config_of(model)
    if getattr(model, "peft_config", None):
        raise ValueError(
            "`model` must have no adapters to deal its heads, which their weights and files know "
            f"nothing of, got {type(model).__name__} with {sorted(model.peft_config)}: merge them "
            "first"
        )
    groups = key_heads(text_config)
    found = []
    for module in attention_modules(model, text_config).values():
        plan = plan_of(module)
        if plan is None or plan.pattern is None:
            continue
        check_dealable(module, groups)
        natural = natural_pattern(module, plan.pattern)
        found.append((module, plan, natural, deal_groups(natural, ranks, groups)))
    if not found:
        raise ValueError("`model` must have layers with bands, got none")
    for module, plan, natural, order in found:
        if hasattr(module, ORDER):
            _permute(module, undeal_heads, getattr(module, ORDER))
        else:
            module.register_state_dict_post_hook(partial(_reorder, undeal_heads))
            module.register_load_state_dict_pre_hook(partial(_reorder, deal_heads))
            module.register_forward_pre_hook(refuse_changed)
        _permute(module, deal_heads, order)
        setattr(module, ORDER, order)
        module.spattention = replace(plan, pattern=deal_pattern(natural, order))
    return model


def natural_pattern(module: torch.nn.Module, pattern: BandPattern) -> BandPattern:
    """A pattern of an attention module with its heads in the order of the config."""
    order = getattr(module, ORDER, None)
    if order is None:
        return pattern
    return deal_pattern(pattern, sorted(range(len(order)), key=lambda place: order[place]))


def _permute(module: Any, change: Any, order: tuple[int, ...]) -> None:
    with torch.no_grad():
        for name, dim in by_heads(module):
            parameter = module.get_parameter(name)
            whole = change(_whole(parameter), order, dim)
            if whole is not parameter and hasattr(parameter, "placements"):
                from torch.distributed.tensor import distribute_tensor

                whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            parameter.copy_(whole)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def _reorder(move: Any, module: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Move the heads in a state dict, as its hooks do; distributed weights become whole."""
    for name, dim in by_heads(module):
        if prefix + name in state:
            state[prefix + name] = move(_whole(state[prefix + name]), getattr(module, ORDER), dim)
