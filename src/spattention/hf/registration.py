"""Register `attn_implementation="spattention"`, and give modules of loaded models their bands."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from typing import Any

from transformers import PreTrainedModel

from .attention import attention_forward
from .cache_guard import before_forward
from .config import NAME, Section, read_section
from .decoder import LayerPlan, check_heads, check_sinks, has_sinks, plan_of
from .mask import rows_mask
from .parallel_guard import guard_parallel
from .section import KINDS, AttentionKind, register_kind
from .sinks import new_sinks
from .weights import Note, note_weights


def register() -> None:
    """Make `attn_implementation="spattention"` known to Transformers, for this process.

    Calling it again does nothing. Call it before loading a model, or a PEFT adapter, that was saved
    with bands. From then on an attention module that is built from a config with a
    `config.spattention` section gets its pattern, and its sinks before weights are loaded into
    them, and an adapter that was trained on bands brings them back.

    Raises:
        ValueError: if something else has registered an attention function of that name.
    """
    if NAME in KINDS:
        return
    register_kind(BANDS)
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
        module.sinks = new_sinks(module, plan.pattern.num_heads)
    module.spattention = plan
    if not any(hook is before_forward for hook in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(before_forward, with_kwargs=True)
    guard_parallel(module)
    note_weights(module, _note)


def _note(module: Any) -> Note | None:
    plan = plan_of(module)
    if plan is None or plan.pattern is None:
        return None
    meaning = {name: value for name, value in plan.pattern.to_dict().items() if name != "recipe"}
    return Note(BANDS.name, BANDS.call, json.dumps(meaning))


def _equip(module: Any) -> None:
    section = read_section(module.config)
    assert section is not None
    pattern = section.layer_patterns[module.layer_idx]
    if pattern is not None:
        check_heads(module, module.config, pattern)
        if section.sinks:
            check_sinks(module)
    equip(module, LayerPlan(pattern, section.sinks and pattern is not None))


def _restore(model: Any, section: Any) -> None:
    from .apply import apply  # which registers first

    config = model.config.get_text_config()
    read = Section(section, config.num_hidden_layers)
    apply(model, read.layer_patterns, sinks=read.sinks)


def _with_strict_sinks(adjust: Callable[..., None]) -> Callable[..., None]:
    @wraps(adjust)
    def strict(self: Any, loading_info: Any) -> None:
        mismatched = {key: shape for key, shape, *_ in loading_info.mismatched_keys}
        for name, module in self.named_modules():
            key = f"{name}.sinks"
            if plan_of(module) is None:
                continue
            if not has_sinks(module):
                if key in loading_info.unexpected_keys:
                    raise ValueError(
                        "`config.spattention` must name the sinks that the checkpoint holds, got "
                        f"{key} in a layer without sinks"
                    )
            elif key in loading_info.missing_keys:
                raise ValueError(
                    "the checkpoint must hold the sinks that `config.spattention` names, got no "
                    f"{key}"
                )
            elif key in mismatched:
                raise ValueError(
                    f"the checkpoint must hold a sink per head, {list(module.sinks.shape)}, got "
                    f"{key} of shape {list(mismatched[key])}"
                )
        adjust(self, loading_info)

    return strict


BANDS = AttentionKind(
    name=NAME,
    call="spattention.hf.register()",
    forward=attention_forward,
    mask=rows_mask,
    is_equipped=lambda module: plan_of(module) is not None,
    equip=_equip,
    restore=_restore,
)
