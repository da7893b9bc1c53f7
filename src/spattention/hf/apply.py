"""Give the attention layers of a model their bands, in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..bands import BandPattern
from .config import NAME, section_of
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
from .registration import equip, register
from .section import kinds_of, section_changed
from .windows import check_windows, replace_windows


def apply(
    model: Any,
    pattern: BandPattern | Sequence[BandPattern | None],
    *,
    layers: Iterable[int] | None = None,
    sinks: bool = False,
) -> Any:
    """Give the attention layers of a causal language model their bands, in place.

    Args:
        model: a Transformers causal language model, or a vision-language model, of which only the
            text decoder changes.
        pattern: one for all layers in question, or one per layer; None leaves that layer alone. Its
            heads are the layer's query heads; under tensor parallelism, where `apply` comes after
            the weights were distributed, a rank's part, `pattern.heads(start, stop)`.
        layers: indices of the text layers in question; default all. With this default a single
            pattern leaves layers with a sliding window of their own alone (unless all share one
            window and the span lies within it); naming a layer, or giving it a pattern of its own,
            replaces its window.
        sinks: give each layer with a pattern a parameter `sinks [H]`, zero at first: learned logits
            that join the softmax's denominator. Sinks that are there already keep their values.

    Returns:
        The same model. `config.spattention` describes what was done and is saved with the model.
        Layers left alone keep the implementation that the model had, "sdpa" or "eager" ("sdpa"
        after loading).

    Raises:
        ValueError: if the model is not causal, does not use Transformers' attention interface, caps
            its scores or returns attention weights, if heads do not match, if a layer cannot give
            up its sliding window, or has sinks of its own that `sinks` would replace. The model is
            then as it was.
    """
    register()
    if not isinstance(sinks, bool):
        raise ValueError(f"`sinks` must be True or False, got {sinks!r}")
    model_config = getattr(model, "config", None)
    if model_config is None or not hasattr(model_config, "get_text_config"):
        raise ValueError(f"`model` must be a Transformers model, got {type(model).__name__}")
    text_config = model_config.get_text_config()
    if getattr(model_config, "is_encoder_decoder", False):
        raise ValueError("`model` must be a decoder alone, got an encoder-decoder")
    for kind in kinds_of(text_config):  # another's section, which would be saved too
        if kind.name != NAME:
            raise ValueError(f'`model` must have stock attention or bands, got "{kind.name}"')
    modules = attention_modules(model, text_config)
    check_model(model, text_config, modules)
    chosen = patterns_by_layer(text_config, modules, pattern, layers)
    if all(entry is None for entry in chosen):
        raise ValueError(
            "`pattern` must be given to at least one layer, but every layer in question has a "
            "sliding window of its own, shorter than the span; name them in `layers` to replace it"
        )
    for index, entry in enumerate(chosen):
        if entry is not None:
            check_heads(modules[index], text_config, entry, getattr(model, "tp_size", None) or 1)
            if sinks:
                check_sinks(modules[index])
    own = own_implementation(text_config, modules, chosen)
    configs = text_configs(model, text_config, modules)
    check_windows(text_config, modules, chosen)
    section = section_of(chosen, sinks)

    # Nothing was changed so far, and nothing fails from here on.
    replace_windows(model, configs, modules, chosen)
    for config in configs:
        config.spattention = section
        config._attn_implementation_internal = NAME
    for index, module in modules.items():
        entry = chosen[index]
        equip(module, LayerPlan(entry, sinks and entry is not None, own))
    section_changed(model)
    return model
