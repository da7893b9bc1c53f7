"""Register `attn_implementation="spattention"`, and give modules of loaded models their bands."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import attention_forward
from .cache_guard import before_forward
from .config import NAME, read_section
from .decoder import LayerPlan, check_heads, check_sinks, has_sinks, is_attention, plan_of
from .mask import rows_mask


def register() -> None:
    """Make `attn_implementation="spattention"` known to Transformers, for this process.

    Calling it again does nothing. Call it before loading a model that was saved with bands. From
    then on an attention module that is built from a config with a `config.spattention` section gets
    its pattern, and its sinks before weights are loaded into them.
    """
    if NAME in ALL_ATTENTION_FUNCTIONS.valid_keys():
        return
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, rows_mask)
    register_module_module_registration_hook(_adopt)
    # Transformers only warns about weights that a checkpoint lacks, and leaves parameters that it
    # does not know uninitialised. There is no public place to be stricter.
    adjust = PreTrainedModel._adjust_missing_and_unexpected_keys
    PreTrainedModel._adjust_missing_and_unexpected_keys = _with_strict_sinks(adjust)


def equip(module: Any, plan: LayerPlan) -> None:
    had_sinks = has_sinks(module)
    if had_sinks and not plan.sinks:
        del module.sinks
    if plan.sinks and not had_sinks:
        assert plan.pattern is not None
        module.sinks = torch.nn.Parameter(_zeros(module, plan.pattern.num_heads))
        module.sinks._is_hf_initialized = True  # Transformers' mark: not to be initialised again
    module.spattention = plan
    if not any(hook is before_forward for hook in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(before_forward, with_kwargs=True)


def _zeros(module: torch.nn.Module, num_heads: int) -> torch.Tensor:
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return torch.zeros(num_heads, dtype=parameter.dtype, device=parameter.device)
    return torch.zeros(num_heads)


def _adopt(parent: torch.nn.Module, name: str, module: Any) -> None:
    """Runs when any module gets a child: attention whose config has the section gets its plan."""
    if isinstance(parent, PreTrainedModel):
        name_for_saving(parent)
    if module is None or not is_attention(module) or plan_of(module) is not None:
        return
    section = read_section(module.config)
    if section is None:
        return
    named = module.config._attn_implementation
    if named != NAME:
        # The config may be a live model's, which Transformers has changed already.
        module.config._attn_implementation_internal = NAME
        raise ValueError(
            '`attn_implementation` must be "spattention" for a model with `config.spattention`, '
            f'got "{named}", which would run it without its bands; '
            "delete `config.spattention` if that is meant"
        )
    pattern = section.layer_patterns[module.layer_idx]
    if pattern is not None:
        check_heads(module, module.config, pattern)
        if section.sinks:
            check_sinks(module)
    equip(module, LayerPlan(pattern, section.sinks and pattern is not None))


def name_for_saving(model: Any) -> None:
    """Write the name where it is saved and honoured on load; loading takes it off again."""
    name = _implementation_below(getattr(model, "config", None))
    if name is not None:
        model.config.attn_implementation = name


def _implementation_below(config: Any) -> str | dict[str, Any] | None:
    """`attn_implementation` for a config: the name, or one per part where only parts run bands."""
    if config is None:
        return None
    if getattr(config, NAME, None) is not None:
        return NAME
    found = {
        key: _implementation_below(getattr(config, key, None))
        for key in getattr(config, "sub_configs", ())
    }
    return {key: name for key, name in found.items() if name is not None} or None


def _with_strict_sinks(adjust: Callable[..., None]) -> Callable[..., None]:
    @wraps(adjust)
    def strict(self: Any, loading_info: Any) -> None:
        for name, module in self.named_modules():
            key = f"{name}.sinks"
            if plan_of(module) is None:
                continue
            if has_sinks(module) and key in loading_info.missing_keys:
                raise ValueError(
                    "the checkpoint must hold the sinks that `config.spattention` names, got no "
                    f"{key}"
                )
            if not has_sinks(module) and key in loading_info.unexpected_keys:
                raise ValueError(
                    "`config.spattention` must name the sinks that the checkpoint holds, got "
                    f"{key} in a layer without sinks"
                )
        adjust(self, loading_info)

    return strict
