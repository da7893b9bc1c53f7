"""Give attention layers their bands: those of a model, in place, and those of a model that is built
from a config with bands.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..bands import BandPattern
from ..compat.huggingface import set_attention_name
from ..compat.pytorch import has_pre_hook
from .attention import attention_forward
from .cache_guard import before_forward
from .config import NAME, Section, read_section, section_of
from .dealable import refuse_dealt
from .decoder import (
    LayerPlan,
    attention_modules,
    check_heads,
    check_model,
    check_sinks,
    has_sinks,
    own_implementation,
    patterns_by_layer,
    plan_of,
    text_config_of,
    text_configs,
)
from .head_weights import causal_weights
from .mask import rows_mask
from .parallel_guard import guard_parallel
from .section import CALL, AttentionKind, kinds_of, register_kind, section_changed
from .sinks import current_sinks, new_parameter, sink_values
from .tensor_parallel import natural_pattern
from .weights import Note, note_weights
from .windows import check_traded, check_windows, replace_windows


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


def apply(
    model: Any,
    pattern: BandPattern | Sequence[BandPattern | None],
    *,
    layers: Iterable[int] | None = None,
    sinks: bool | float | Sequence[torch.Tensor | None] = False,
) -> Any:
    """Give the attention layers of a causal language model their bands, in place.

    Args:
        model: a Transformers causal language model, or a vision-language model, of which only the
            text decoder changes.
        pattern: one for all layers in question, or one per layer; None leaves that layer alone. Its
            heads are the layer's query heads, on all ranks where `tp_plan="auto"` distributed the
            weights: each rank attends with its part.
        layers: indices of the text layers in question; default all. With this default a single
            pattern leaves layers with a sliding window of their own alone (unless all share one
            window and the span lies within it); naming a layer, or giving it a pattern of its own,
            replaces its window.
        sinks: give each layer with a pattern a parameter `sinks [H]`: learned logits that join the
            softmax's denominator. True starts them at zero, and sinks that are there already keep
            their values. A number, or one tensor `[H]` per layer in question (None for a layer
            without a pattern), sets them; `spattention.fitting.starting_sinks` measures such.

    Returns:
        The same model. `config.spattention` describes what was done and is saved with the model.
        Layers left alone keep the implementation that the model had, "sdpa" or "eager" ("sdpa"
        after loading).

    Raises:
        ValueError: if the model is not causal, does not use Transformers' attention interface, caps
            its scores or returns attention weights, if heads do not match, if a layer cannot give
            up its sliding window, or has sinks of its own that `sinks` would replace, or if `sinks`
            are not finite or of another shape. The model is then as it was.
    """
    register()
    text_config = text_config_of(model)
    for kind in kinds_of(text_config):  # another's section, which would be saved too
        if kind.name != NAME:
            raise ValueError(f'`model` must have stock attention or bands, got "{kind.name}"')
    refuse_dealt(model, "to be given bands")
    modules = attention_modules(model, text_config)
    check_model(model, text_config, modules)
    layers = list(layers) if isinstance(layers, Iterable) else layers
    chosen = patterns_by_layer(text_config, modules, pattern, layers)
    if all(entry is None for entry in chosen):
        raise ValueError(
            "`pattern` must be given to at least one layer, but every layer in question has a "
            "sliding window of its own, shorter than the span; name them in `layers` to replace it"
        )
    with_sinks = sinks is not False
    named = sorted(modules) if layers is None else layers
    heads = [0 if (entry := chosen[index]) is None else entry.num_heads for index in named]
    starts = dict(zip(named, sink_values(sinks, named, heads))) if with_sinks else {}
    for index, entry in enumerate(chosen):
        if entry is not None:
            check_heads(modules[index], text_config, entry, getattr(model, "tp_size", None) or 1)
            if with_sinks:
                check_sinks(modules[index])
    own = own_implementation(text_config, modules, chosen)
    configs = text_configs(model, text_config, modules)
    check_windows(text_config, chosen)
    section = section_of(chosen, with_sinks)

    # Nothing was changed so far, and nothing fails from here on.
    replace_windows(model, configs, modules, chosen)
    for config in configs:
        config.spattention = section
        set_attention_name(config, NAME)
    for index, module in modules.items():
        entry = chosen[index]
        _equip(module, LayerPlan(entry, with_sinks and entry is not None, own))
        values = starts.get(index)
        if values is not None:
            with torch.no_grad():
                found = current_sinks(module)
                found.copy_(values.to(found))
    section_changed(model)
    return model


def _equip_from_config(module: Any) -> None:
    section = read_section(module.config)
    assert section is not None
    pattern = section.layer_patterns[module.layer_idx]
    if pattern is not None:
        check_heads(module, module.config, pattern)
        check_traded(module.config, module.layer_idx, pattern)
        if section.sinks:
            check_sinks(module)
    _equip(module, LayerPlan(pattern, section.sinks and pattern is not None))


def _restore(model: Any, section: Any) -> None:
    """Give a model with stock attention the bands of an adapter."""
    read = Section(section, text_config_of(model).num_hidden_layers)
    apply(model, read.layer_patterns, sinks=read.sinks)


def _equip(module: Any, plan: LayerPlan) -> None:
    """Give an attention module its plan, its sinks, and the hooks that guard both."""
    had_sinks = has_sinks(module)
    if had_sinks and not plan.sinks:
        del module.sinks
    if plan.sinks and not had_sinks:
        assert plan.pattern is not None
        module.sinks = new_parameter(module, torch.zeros(plan.pattern.num_heads))
    module.spattention = plan
    if not has_pre_hook(module, before_forward):
        module.register_forward_pre_hook(before_forward, with_kwargs=True)
    guard_parallel(module)
    note_weights(module, _note)


def _note(module: Any) -> Note | None:
    plan = plan_of(module)
    if plan is None or plan.pattern is None:
        return None
    return band_note(natural_pattern(module, plan.pattern))  # as weights are written, dealt or not


def band_note(pattern: BandPattern) -> Note:
    """The note of an attention module's weights with these bands."""
    meaning = {name: value for name, value in pattern.to_dict().items() if name != "recipe"}
    return Note(NAME, CALL, json.dumps(meaning))


def _check_loaded_sinks(model: Any, loading_info: Any) -> None:
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
    equip=_equip_from_config,
    restore=_restore,
    weights=causal_weights,
    check_weights=_check_loaded_sinks,
)
