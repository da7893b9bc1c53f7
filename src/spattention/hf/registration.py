"""Register `attn_implementation="spattention"`, and give modules of loaded models their bands."""

from __future__ import annotations

from typing import Any

from .attention import attention_forward
from .config import NAME, Section, read_section
from .conversion import convert
from .decoder import LayerPlan, check_heads, check_sinks, has_sinks, plan_of
from .equip import CALL, equip
from .head_weights import causal_weights
from .mask import rows_mask
from .section import AttentionKind, register_kind
from .windows import check_traded


def register() -> None:
    """Make `attn_implementation="spattention"` known to Transformers, for this process.

    Calling it again does nothing. Call it before loading a model, or a PEFT adapter, that was saved
    with bands. From then on an attention module that is built from a config with a
    `config.spattention` section gets its pattern, and its sinks before weights are loaded into
    them, and an adapter that was trained on bands brings them back.

    Raises:
        ValueError: if something else has registered an attention function of that name.
    """
    register_kind(BANDS)


def _equip(module: Any) -> None:
    section = read_section(module.config)
    assert section is not None
    pattern = section.layer_patterns[module.layer_idx]
    if pattern is not None:
        check_heads(module, module.config, pattern)
        check_traded(module.config, module.layer_idx, pattern)
        if section.sinks:
            check_sinks(module)
    equip(module, LayerPlan(pattern, section.sinks and pattern is not None))


def _restore(model: Any, section: Any) -> None:
    config = model.config.get_text_config()
    read = Section(section, config.num_hidden_layers)
    convert(model, read.layer_patterns, None, read.sinks)


def _check_sinks(model: Any, loading_info: Any) -> None:
    mismatched = {key: shape for key, shape, *_ in loading_info.mismatched_keys}
    for name, module in model.named_modules():
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
                f"the checkpoint must hold the sinks that `config.spattention` names, got no {key}"
            )
        elif key in mismatched:
            raise ValueError(
                f"the checkpoint must hold a sink per head, {list(module.sinks.shape)}, got {key} "
                f"of shape {list(mismatched[key])}"
            )


BANDS = AttentionKind(
    name=NAME,
    call=CALL,
    forward=attention_forward,
    mask=rows_mask,
    is_equipped=lambda module: plan_of(module) is not None,
    equip=_equip,
    restore=_restore,
    weights=causal_weights,
    check_weights=_check_sinks,
)
