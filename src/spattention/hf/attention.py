"""Bands as an attention implementation of Transformers, and their application to a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention import band_attention, band_attention_varlen
from ..bands import BandPattern
from ..checks import readable
from .cache import BandHandle
from .config import NAME, read_section, section_of
from .decoder import (
    LayerPlan,
    attention_modules,
    check_heads,
    check_model,
    check_sinks,
    has_sinks,
    is_attention,
    own_implementation,
    patterns_by_layer,
    plan_of,
    text_configs,
)
from .mask import Rows, add_restarts, decode, dense_mask, is_packed, rows_mask
from .windows import check_windows, replace_windows

PACKED = f"{NAME}_packed"  # mark of a cache that was filled from packed rows
CACHE_ARGUMENTS = ("past_key_values", "layer_past")
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")

# Keywords that models pass on to their attention functions and that do not say who attends whom.
WITHOUT_EFFECT = frozenset(
    {
        "cache_position",
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",  # read where the mask is made and in `_before_forward`
        "return_dict",
        "seq_idx",  # the documents of `position_ids`, for layers that are not attention
        "sliding_window",  # a layer with a pattern has no window of its own any more
        "use_cache",
    }
)
HONOURED = frozenset({"is_causal", "output_attentions", "s_aux", "softcap", *PACKING})


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
        _equip(module, LayerPlan(entry, sinks and entry is not None, own))
    _name_for_saving(model)
    return model


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **keywords: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function of `attn_implementation="spattention"`.

    Args:
        module: the attention module, which knows its pattern.
        query: `[B, H, Q, D]`.
        key: `[B, Hkv, K, D]`, the cache already in it; value alike. Both the handle of a
            `BandCache` if the model has one.
        value: `[B, Hkv, K, Dv]`.
        attention_mask: what `rows_mask` made.
        scaling: factor of the scores.
        dropout: must be 0.
        keywords: whatever the model passes: honoured, known to have no effect here, or refused.

    Returns:
        `([B, Q, H, Dv], None)`.
    """
    plan = plan_of(module)
    if plan is None:
        raise ValueError(
            '`attn_implementation="spattention"` needs a pattern for every attention module: call '
            "`spattention.hf.apply`, or set `config.spattention` before the model is built; got "
            f"none for {type(module).__name__}"
        )
    rows = decode(attention_mask)
    if plan.pattern is None:
        return _own_attention(plan.own, module, query, key, value, rows, scaling, dropout, keywords)
    _check_keywords(module, dropout, keywords)
    if query.shape[1] != plan.pattern.num_heads:
        raise ValueError(
            f"`pattern` has {plan.pattern.num_heads} heads but `query` has {query.shape[1]}: under "
            "tensor parallelism give each rank its part, `pattern.heads(start, stop)`"
        )
    sinks = _sinks(module, keywords)
    packed = any(keywords.get(name) is not None for name in PACKING)
    if isinstance(key, BandHandle):
        if packed:
            raise ValueError(
                f"`past_key_values` must not be a BandCache with `{PACKING[0]}`: flattened rows "
                "cannot be continued"
            )
        out = key.attend(query, plan.pattern, scale=scaling, sinks=sinks, key_start=rows.key_start)
    elif packed:
        out = _packed(query, key, value, plan.pattern, rows, scaling, sinks, keywords)
    else:
        result = band_attention(
            query,
            key,
            value,
            plan.pattern,
            scale=scaling,
            sinks=sinks,
            query_start=rows.query_start,
            key_start=rows.key_start,
        )
        assert isinstance(result, torch.Tensor)  # no log-sum-exp was asked for
        out = result
    return out.transpose(1, 2), None


def _packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: BandPattern,
    rows: Rows,
    scaling: float | None,
    sinks: torch.Tensor | None,
    keywords: dict[str, Any],
) -> torch.Tensor:
    """Documents flattened into one row, with FlashAttention's offsets."""
    missing = [name for name in PACKING if keywords.get(name) is None]
    if missing:
        raise ValueError(f"`{PACKING[0]}` must come with all of {PACKING[1:]}, got no {missing}")
    if query.shape[0] != 1 or key.shape[2] != query.shape[2] or rows.query_start is not None:
        raise ValueError(
            "`cu_seq_lens_q` must describe one row [1, T] without a filled cache, "
            f"got {query.shape[0]} rows of {query.shape[2]} queries and {key.shape[2]} keys"
        )
    if rows.padded:
        raise ValueError("`attention_mask` must be None with `cu_seq_lens_q`, got a padding mask")
    out = band_attention_varlen(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        pattern,
        keywords["cu_seq_lens_q"].to(torch.int32),
        keywords["cu_seq_lens_k"].to(torch.int32),
        int(keywords["max_length_q"]),
        int(keywords["max_length_k"]),
        scale=scaling,
        sinks=sinks,
    )
    assert isinstance(out, torch.Tensor)
    return out.transpose(0, 1)[None]


def _own_attention(
    implementation: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: Rows,
    scaling: float | None,
    dropout: float,
    keywords: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A layer without a pattern: the model's implementation, with the mask that it would have."""
    offsets = keywords.get("cu_seq_lens_k")
    if offsets is not None and rows.key_start is None:
        tokens = torch.arange(key.shape[2], device=key.device)
        document = torch.searchsorted(offsets[1:].contiguous(), tokens, right=True)
        rows = Rows(offsets[document.clamp(max=len(offsets) - 1)][None], rows.query_start)
    window = keywords.get("sliding_window")
    lengths = query.shape[2], key.shape[2]
    plain = rows.plain and lengths[0] in (1, lengths[1]) and (window or lengths[1]) >= lengths[1]
    mask: torch.Tensor | None
    # SDPA knows no sinks and no caps, and models that have them say so by keyword.
    if implementation == "eager" or keywords.get("s_aux") is not None or keywords.get("softcap"):
        forward = sys.modules[type(module).__module__].eager_attention_forward
        seen = dense_mask(rows, *lengths, window, query.device)
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, lowest)
    else:
        forward = ALL_ATTENTION_FUNCTIONS[implementation]
        mask = None if plain else dense_mask(rows, *lengths, window, query.device)
    return forward(module, query, key, value, mask, scaling=scaling, dropout=dropout, **keywords)


def _check_keywords(module: torch.nn.Module, dropout: float, keywords: dict[str, Any]) -> None:
    if dropout > 0:
        raise ValueError(
            f"attention dropout must be 0 for spattention, got {dropout}: set "
            "`attention_dropout` of the model's config to 0 (`attn_pdrop` in GPT-2 and its kin)"
        )
    if keywords.get("output_attentions"):
        raise ValueError(
            "`output_attentions` must be False for spattention, which never forms the weights, "
            "got True"
        )
    if keywords.get("softcap") is not None:
        raise ValueError(f"`softcap` must be None for spattention, got {keywords['softcap']}")
    if not getattr(module, "is_causal", True) or keywords.get("is_causal") is False:
        raise ValueError("the model must be causal for spattention, got `is_causal=False`")
    for name, given in keywords.items():
        # One by one: PyTorch 2.11 does not compile the difference of keys and a frozenset.
        known = name in HONOURED or name in WITHOUT_EFFECT
        if not known and given is not None and given is not False:
            raise ValueError(
                f"`{name}` is a keyword that spattention does not know and cannot honour; it must "
                f"be None, got {type(given).__name__}"
            )


def _sinks(module: torch.nn.Module, keywords: dict[str, Any]) -> torch.Tensor | None:
    """The layer's own sinks (`s_aux`, as in gpt-oss) or those from `apply`."""
    sinks = keywords.get("s_aux")
    if sinks is None and has_sinks(module):
        sinks = module.sinks
    # The operator takes query's dtype or float32, and a parameter may have neither: a bfloat16 one
    # under float16 autocast, or where rotary positions make queries float32.
    return sinks if sinks is None or sinks.dtype == torch.float64 else sinks.float()


def _before_forward(
    module: Any, args: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """What the attention function cannot see: the cache, and documents packed beside one.

    Transformers looks for documents in `position_ids` only when there is no cache, yet a model
    makes a cache by default; without this, packed rows would leak from one document into the next.
    """
    plan, section = plan_of(module), read_section(module.config)
    if plan is None or module.config._attn_implementation != NAME or section is None:
        return None
    cache = next((keywords[k] for k in CACHE_ARGUMENTS if keywords.get(k) is not None), None)
    if cache is None:
        return None
    hidden = args[0] if args else keywords["hidden_states"]
    _check_room(cache, module.layer_idx, rows=hidden.shape[0], tokens=hidden.shape[1])
    if plan.pattern is not None:
        _check_cache(cache, module.layer_idx, plan.pattern)
    if getattr(cache, PACKED, False):
        if _length(cache, module.layer_idx) > 0:
            raise ValueError(
                "`past_key_values` must hold one document per row to be continued, got packed rows"
            )
        setattr(cache, PACKED, False)  # it was emptied since
    offsets = keywords.get("cu_seq_lens_q")
    if offsets is not None and readable(offsets) and bool((offsets.diff() > 0).sum() > 1):
        setattr(cache, PACKED, True)
    position_ids, mask = keywords.get("position_ids"), keywords.get("attention_mask")
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] == 1:
        return None
    length = cache.get_seq_length(module.layer_idx)
    key_len = 0 if isinstance(length, torch.Tensor) else length + position_ids.shape[1]
    split = add_restarts(mask, position_ids, hidden.shape[0], key_len)
    if readable(position_ids) and is_packed(mask, split):
        setattr(cache, PACKED, True)
    return args, {**keywords, "attention_mask": split}


def _check_room(cache: Any, layer: int, rows: int, tokens: int) -> None:
    """A cache keeps its batch, and one of a fixed length takes no more than that."""
    if layer >= len(cache.layers):
        return
    held = cache.layers[layer]
    keys = getattr(held, "keys", None)
    if keys is not None and keys.numel() > 0 and keys.shape[0] != rows:
        raise ValueError(
            f"`past_key_values` must go on with the batch that it was filled with, {keys.shape[0]} "
            f"rows, got {rows} in layer {layer}"
        )
    room = getattr(held, "max_cache_len", None)
    if room is None or held.is_sliding:
        return
    length = held.get_seq_length()
    if isinstance(length, torch.Tensor):
        length = int(length) if readable(length) else 0
    if length + tokens > room:
        raise ValueError(
            f"`past_key_values` must have room for {length + tokens} tokens, got a cache for {room}"
        )


def _check_cache(cache: Any, layer: int, pattern: BandPattern) -> None:
    """A cache belongs to the pattern that filled it: deeper keys were computed through it."""
    if layer < len(cache.layers) and getattr(cache.layers[layer], "is_sliding", False):
        raise ValueError(
            "`past_key_values` must keep every key for spattention, got a sliding window in layer "
            f"{layer}"
        )
    filled_by = getattr(cache, NAME, None)
    if filled_by is None:
        filled_by = {}
        setattr(cache, NAME, filled_by)
    known = filled_by.get(layer)
    if known == pattern:
        return
    if _length(cache, layer, unreadable=int(known is not None)) > 0:
        raise ValueError(
            f"`past_key_values` must have been filled under this layer's pattern {pattern}, "
            f"got {'another attention' if known is None else known} in layer {layer}"
        )
    filled_by[layer] = pattern


def _length(cache: Any, layer: int, unreadable: int = 1) -> int:
    """Keys that a layer of the cache holds; `unreadable` for a static cache in a compiled graph."""
    length = cache.get_seq_length(layer)
    if isinstance(length, torch.Tensor) and torch.compiler.is_compiling():
        return unreadable
    return int(length)


def _adopt(parent: torch.nn.Module, name: str, module: Any) -> None:
    """Runs when any module gets a child: attention whose config has the section gets its plan."""
    if isinstance(parent, PreTrainedModel):
        _name_for_saving(parent)
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
    _equip(module, LayerPlan(pattern, section.sinks and pattern is not None))


def _name_for_saving(model: Any) -> None:
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


def _equip(module: Any, plan: LayerPlan) -> None:
    had_sinks = has_sinks(module)
    if had_sinks and not plan.sinks:
        del module.sinks
    if plan.sinks and not had_sinks:
        assert plan.pattern is not None
        module.sinks = torch.nn.Parameter(_zeros(module, plan.pattern.num_heads))
        module.sinks._is_hf_initialized = True  # Transformers' mark: not to be initialised again
    module.spattention = plan
    if not any(hook is _before_forward for hook in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(_before_forward, with_kwargs=True)


def _zeros(module: torch.nn.Module, num_heads: int) -> torch.Tensor:
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return torch.zeros(num_heads, dtype=parameter.dtype, device=parameter.device)
    return torch.zeros(num_heads)


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
