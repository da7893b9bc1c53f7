"""Give the attention modules of a model their plans: checks first, then the change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..bands import BandPattern
from ..compat.huggingface import set_attention_name
from .config import NAME, section_of
from .dealable import refuse_dealt
from .decoder import (
    LayerPlan,
    attention_modules,
    check_heads,
    check_model,
    check_sinks,
    own_implementation,
    patterns_by_layer,
    text_configs,
)
from .equip import equip
from .section import kinds_of, section_changed
from .sinks import sink_values, start_sinks
from .windows import check_windows, replace_windows


def convert(
    model: Any,
    pattern: BandPattern | Sequence[BandPattern | None],
    layers: Iterable[int] | None,
    sinks: bool | float | Sequence[torch.Tensor | None],
) -> Any:
    """Do the work of `apply`, whose arguments these are, in a process that has registered."""
    model_config = getattr(model, "config", None)
    if model_config is None or not hasattr(model_config, "get_text_config"):
        raise ValueError(f"`model` must be a Transformers model, got {type(model).__name__}")
    text_config = model_config.get_text_config()
    if getattr(model_config, "is_encoder_decoder", False):
        raise ValueError("`model` must be a decoder alone, got an encoder-decoder")
    for kind in kinds_of(text_config):  # another's section, which would be saved too
        if kind.name != NAME:
            raise ValueError(f'`model` must have stock attention or bands, got "{kind.name}"')
    refuse_dealt(model, "model", "to be given bands")
    modules = attention_modules(model, text_config)
    check_model(model, text_config, modules)
    chosen = patterns_by_layer(text_config, modules, pattern, layers)
    if all(entry is None for entry in chosen):
        raise ValueError(
            "`pattern` must be given to at least one layer, but every layer in question has a "
            "sliding window of its own, shorter than the span; name them in `layers` to replace it"
        )
    has_sinks = sinks is not False
    named = sorted(modules) if layers is None else list(layers)
    heads = [0 if (entry := chosen[index]) is None else entry.num_heads for index in named]
    starts = dict(zip(named, sink_values(sinks, named, heads))) if has_sinks else {}
    for index, entry in enumerate(chosen):
        if entry is not None:
            check_heads(modules[index], text_config, entry, getattr(model, "tp_size", None) or 1)
            if has_sinks:
                check_sinks(modules[index])
    own = own_implementation(text_config, modules, chosen)
    configs = text_configs(model, text_config, modules)
    check_windows(text_config, modules, chosen)
    section = section_of(chosen, has_sinks)

    # Nothing was changed so far, and nothing fails from here on.
    replace_windows(model, configs, modules, chosen)
    for config in configs:
        config.spattention = section
        set_attention_name(config, NAME)
    for index, module in modules.items():
        entry = chosen[index]
        equip(module, LayerPlan(entry, has_sinks and entry is not None, own))
        values = starts.get(index)
        if values is not None:
            start_sinks(module, values)
    section_changed(model)
    return model
