"""Facts of a model before it gets bands: attention layers and configs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from transformers import PreTrainedModel

from ..bands import BandPattern
from ..compat.huggingface import attention_name, follows_attention_interface
from ..scalars import as_int
from .config import NAME
from .windows import keeps_window

OWN_IMPLEMENTATIONS = ("sdpa", "eager")


@dataclass(frozen=True)
class LayerPlan:
    """The plan of one attention module.

    Attributes:
        pattern: its bands; None for a layer that keeps its own attention.
        sinks: whether the module has the parameter `sinks` from `apply` or the config.
        own: the implementation of its own attention, "sdpa" or "eager", when there is no pattern.
    """

    pattern: BandPattern | None
    sinks: bool = False
    own: str = "sdpa"


def text_config_of(model: Any) -> Any:
    """The text config of a Transformers model; raises `ValueError` unless it is a decoder alone."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ValueError(f"`model` must be a Transformers model, got {type(model).__name__}")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("`model` must be a decoder alone, got an encoder-decoder")
    return config.get_text_config()


def key_heads(config: Any) -> int:
    """Key/value heads of a text config."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def head_dim(config: Any) -> int:
    """Width of a head of a text config."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(width)


def plan_of(module: torch.nn.Module) -> LayerPlan | None:
    """The plan of an attention module; None for any other module."""
    return getattr(module, NAME, None)


def has_sinks(module: torch.nn.Module) -> bool:
    """True if an attention module has the parameter `sinks` from `apply` or the config."""
    plan = plan_of(module)
    return plan is not None and plan.sinks


def is_attention(module: torch.nn.Module) -> TypeGuard[Any]:
    """True if a module is self-attention of a decoder, by what all of them have in common."""
    return (
        isinstance(getattr(module, "layer_idx", None), int)
        and hasattr(module, "is_causal")
        and hasattr(module, "config")
        and not getattr(module, "is_cross_attention", False)
    )


def attention_modules(model: Any, text_config: Any) -> dict[int, Any]:
    """The text decoder's attention modules by layer index."""
    modules: dict[int, Any] = {}
    for module in model.modules():
        if is_attention(module) and type(module.config) is type(text_config):
            if module.layer_idx in modules:
                raise ValueError(
                    "`model` must have one attention module per text layer, got two with index "
                    f"{module.layer_idx}"
                )
            modules[module.layer_idx] = module
    return modules


def text_configs(model: Any, text_config: Any, modules: dict[int, Any]) -> list[Any]:
    """Every object that is the text config: parts of some models hold copies of it."""
    found = {id(text_config): text_config}
    for module in modules.values():
        found[id(module.config)] = module.config
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and type(module.config) is type(text_config):
            found[id(module.config)] = module.config
    return list(found.values())


def check_model(model: Any, config: Any, modules: dict[int, Any]) -> None:
    """Check that a model's attention can be banded; raise `ValueError` otherwise."""
    if not modules:
        raise ValueError(
            "`model` must have decoder self-attention that follows Transformers' attention "
            f"interface, got {type(model).__name__}"
        )
    decoders = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    if any(type(m.config) is type(config) and not follows_attention_interface(m) for m in decoders):
        raise ValueError(
            f"`model` must use Transformers' attention interface, which {type(model).__name__} "
            "does not"
        )
    if not getattr(config, "is_causal", True) or not all(m.is_causal for m in modules.values()):
        raise ValueError("`model` must be causal, got bidirectional attention")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ValueError(
            "`model` must not cap its scores, got attn_logit_softcapping = "
            f"{config.attn_logit_softcapping}"
        )
    if model.config.output_attentions or config.output_attentions:
        raise ValueError("`model` must not return attention weights, got output_attentions = True")
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None or "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(f"`model` must not attend in chunks, got attention_chunk_size = {chunk}")


def patterns_by_layer(
    config: Any,
    modules: dict[int, Any],
    pattern: BandPattern | Sequence[BandPattern | None],
    layers: Iterable[int] | None,
) -> list[BandPattern | None]:
    """One entry per text layer, None where its own attention stays; arguments as in `apply`."""
    count = config.num_hidden_layers
    if layers is not None and not isinstance(layers, Iterable):
        raise ValueError(f"`layers` must be indices of text layers, got {layers!r}")
    named = None
    if layers is not None:
        given = list(layers)
        if not given:
            raise ValueError("`layers` must name at least one text layer, got none")
        named = [i for i in map(as_int, given) if i is not None and 0 <= i < count]
        if len(set(named)) != len(given):
            raise ValueError(
                f"`layers` must be distinct indices from 0 to {count - 1} of text layers, got "
                f"{given}"
            )
    chosen: list[BandPattern | None] = [None] * count
    if isinstance(pattern, BandPattern):
        where = sorted(modules) if named is None else named
        for index in where:
            if named is not None or not keeps_window(config, index, pattern):
                chosen[index] = pattern
    else:
        where = list(range(count)) if named is None else named
        is_list = isinstance(pattern, Sequence) and not isinstance(pattern, str)
        if not is_list or len(pattern) != len(where):
            shown = len(pattern) if is_list else type(pattern).__name__
            raise ValueError(
                "`pattern` must be a BandPattern or a sequence of one (or None) per layer, "
                f"{len(where)}, got {shown}"
            )
        for index, entry in zip(where, pattern):
            if entry is not None and not isinstance(entry, BandPattern):
                raise ValueError(
                    f"`pattern` must hold BandPattern or None, got {type(entry).__name__} for "
                    f"layer {index}"
                )
            chosen[index] = entry
        if all(entry is None for entry in chosen):
            raise ValueError(
                "`pattern` must hold at least one BandPattern, got None for every layer"
            )
    for index, entry in enumerate(chosen):
        if entry is not None and index not in modules:
            raise ValueError(
                f"`layers` must name layers with softmax attention, got {index}, which has none"
            )
    return chosen


def check_heads(module: Any, config: Any, pattern: BandPattern, ranks: int = 1) -> None:
    """Check that a pattern has the heads of an attention module, all of them or those of this rank,
    where Transformers split them over `ranks`."""
    heads = config.num_attention_heads
    here = _heads_here(module, heads, ranks)
    if pattern.num_heads not in (heads, here):
        raise ValueError(
            f"`pattern` has {pattern.num_heads} heads but layer {module.layer_idx} of the model "
            f"has {heads}" + (f", {here} of them on this rank" if here != heads else "")
        )


def _heads_here(module: Any, heads: int, ranks: int) -> int:
    """Query heads whose weights this process holds."""
    here = heads
    for child in module.modules():
        rows, weight = getattr(child, "out_features", None), getattr(child, "weight", None)
        if rows and isinstance(weight, torch.Tensor) and weight.dim() == 2:
            # A rank holds some rows of the query projection, whose `out_features` count them all.
            held = weight.to_local() if hasattr(weight, "to_local") else weight
            here = min(here, heads * held.shape[0] // rows)
    # Earlier versions of Transformers also lower `out_features`.
    return heads // ranks if here == heads else here


def check_sinks(module: Any) -> None:
    """A module that is to have sinks must not have its own, as in gpt-oss."""
    if hasattr(module, "sinks") and not has_sinks(module):
        raise ValueError(
            f"`sinks` must be False for {type(module).__name__}, which has its own, got True"
        )


def own_implementation(
    config: Any, modules: dict[int, Any], chosen: Sequence[BandPattern | None]
) -> str:
    """The attention implementation of layers without a pattern."""
    own = attention_name(config)
    if own == NAME:
        plans = [plan_of(module) for module in modules.values()]
        return next((plan.own for plan in plans if plan is not None), "sdpa")
    if own not in OWN_IMPLEMENTATIONS:
        if any(chosen[index] is None for index in modules):
            raise ValueError(
                f"`model` must have been loaded with attn_implementation in {OWN_IMPLEMENTATIONS} "
                f'to leave layers alone, got "{own}"'
            )
        return "sdpa"
    return own
