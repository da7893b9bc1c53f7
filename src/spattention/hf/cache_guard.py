"""Checks before each attention layer runs: its cache, and documents packed into its rows."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from ..bands import BandPattern
from ..checks import readable
from ..compat.huggingface import attention_name
from .cache import BandCache, BandLayer, passed_cache
from .config import NAME, Section, read_section
from .context_parallel import is_context_parallel
from .decoder import plan_of
from .mask import Rows, add_restarts, decidable, decode, is_packed
from .packing import PACKING, refuse_jumps, warn_of_restarts
from .tensor_parallel import head_shard, natural_pattern
from .windows import check_traded

PACKED = f"{NAME}_packed"  # mark of a cache that was filled from packed rows
SPLIT = f"{NAME}_split"  # rows of the pass that a cache is in, split where positions restart


def before_forward(
    module: Any, args: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Check the cache and the positions, which the attention function does not see, and split
    packed rows.

    Transformers looks for documents in `position_ids` only when there is no cache, yet a model
    makes a cache by default. Without this hook packed rows would leak from one document into the
    next.
    """
    plan, section = plan_of(module), read_section(module.config)
    if plan is None or attention_name(module.config) != NAME or section is None:
        _refuse_keys_of_bands(module, keywords)
        return None
    if plan.pattern is not None and not torch.compiler.is_compiling():
        check_traded(module.config, module.layer_idx, plan.pattern)  # a config can be changed
    if is_context_parallel(module):
        return None  # without a cache, and positions were read before rows were split
    cache = passed_cache(keywords)
    position_ids, mask = keywords.get("position_ids"), keywords.get("attention_mask")
    if position_ids is not None and (position_ids.dim() != 2 or position_ids.shape[1] == 1):
        position_ids = None  # nothing to compare
    # A compiled layer reads no values, and asking for its index would make a graph per layer.
    reads = position_ids is not None and not torch.compiler.is_compiling()
    if reads and _is_first(module, section):
        assert position_ids is not None
        packed = any(keywords.get(name) is not None for name in PACKING)
        _check_positions(module, position_ids, decode(mask), packed, cache is not None)
    if cache is None:
        return None
    if not hasattr(cache, "layers"):
        raise ValueError(
            "`past_key_values` must be a cache of a decoder, a list of `layers`, for spattention, "
            f"got {type(cache).__name__}"
        )
    hidden = args[0] if args else keywords["hidden_states"]
    _check_room(cache, module.layer_idx, rows=hidden.shape[0], tokens=hidden.shape[1])
    if plan.pattern is not None:
        _check_cache(cache, module.layer_idx, plan.pattern)
        layer = cache.layers[module.layer_idx] if module.layer_idx < len(cache.layers) else None
        if isinstance(layer, BandLayer) and layer.store is None:
            layer.shard = head_shard(module)
            if layer.pattern == natural_pattern(module, plan.pattern):
                layer.pattern = plan.pattern  # with its heads dealt
    if getattr(cache, PACKED, False):
        if _length(cache, module.layer_idx) > 0:
            raise ValueError(
                "`past_key_values` must hold one document per row to be continued, got packed rows"
            )
        setattr(cache, PACKED, False)  # it was emptied since
    offsets = keywords.get("cu_seq_lens_q")
    if offsets is not None and readable(offsets) and bool((offsets.diff() > 0).sum() > 1):
        setattr(cache, PACKED, True)
    if position_ids is None:
        return None
    length = cache.get_seq_length(module.layer_idx)
    key_len = 0 if isinstance(length, torch.Tensor) else length + position_ids.shape[1]
    split = _split(cache, module.layer_idx, mask, position_ids, hidden.shape[0], key_len)
    if readable(position_ids) and is_packed(mask, split):
        setattr(cache, PACKED, True)
    return args, {**keywords, "attention_mask": split}


def _split(
    cache: Any,
    layer: int,
    mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    batch_size: int,
    key_len: int,
) -> torch.Tensor | None:
    """`add_restarts`, once per forward pass: layers hand on the same tensors, and the first of them
    looks at the values, which waits for a GPU."""
    if torch.compiler.is_compiling():
        return add_restarts(mask, position_ids, batch_size, key_len)
    known = getattr(cache, SPLIT, None)
    if known is not None:
        before, of_mask, of_positions, of_length, split = known
        same = of_mask is mask and of_positions is position_ids and of_length == key_len
        if not same or before >= layer:  # another pass; its tensors may have other values
            known = None
    if known is None:
        split = add_restarts(mask, position_ids, batch_size, key_len)
    setattr(cache, SPLIT, (layer, mask, position_ids, key_len, split))
    return split


def _refuse_keys_of_bands(module: Any, keywords: dict[str, Any]) -> None:
    """Check that a model that was made dense does not continue from keys of its bands."""
    cache = passed_cache(keywords)
    filled_by = getattr(cache, NAME, None) or {}
    if module.layer_idx in filled_by and _length(cache, module.layer_idx, unreadable=0) > 0:
        raise ValueError(
            "`past_key_values` must have been filled by the attention that continues from it, "
            f'"{attention_name(module.config)}", got keys of bands in layer {module.layer_idx}'
        )


def trust_cache(cache: Any, model: Any) -> None:
    """Declare that `model` filled a cache, under the bands that it has now.

    A cache that came from the model itself needs no such word. One that was rebuilt from its
    tensors does, such as `DynamicCache(tensors)`, or one that another process or library made:
    nothing in it says under which bands its keys were computed, and other bands give other keys.

    Args:
        cache: a Transformers cache that keeps every key.
        model: a model with bands.

    Raises:
        ValueError: if either is something else.
    """
    if not isinstance(cache, Cache) or isinstance(cache, BandCache):
        raise ValueError(
            f"`cache` must be a Transformers cache that keeps every key, got {type(cache).__name__}"
        )
    config: Any = getattr(model, "config", None)
    section = None
    if hasattr(config, "get_text_config"):
        section = read_section(config.get_text_config(decoder=True))
    if section is None:
        raise ValueError(
            "`model` must have bands (call `spattention.hf.apply` first), got "
            f"{type(model).__name__} without"
        )
    patterns = enumerate(section.layer_patterns)
    setattr(cache, NAME, {index: pattern for index, pattern in patterns if pattern is not None})


def _is_first(module: Any, section: Section) -> bool:
    """True for the first module with bands, which checks what is the same in all of them."""
    indices = (index for index, pattern in enumerate(section.layer_patterns) if pattern is not None)
    return module.layer_idx == next(indices, None)


def _check_positions(
    module: Any, position_ids: torch.Tensor, rows: Rows, packed: bool, cached: bool
) -> None:
    """Check that positions go up by one, or restart where a packed document starts. Reads values
    once per forward pass, where they can be read at all."""
    if not decidable(position_ids):
        return
    if rows.padded:
        warn_of_restarts(module, position_ids, rows)
        return
    documents = rows.key_start is not None and rows.key_start.dim() == 2
    if packed or not (cached or documents):  # Transformers has looked at positions without a cache
        return
    refuse_jumps(
        position_ids,
        "with an `attention_mask` of ones distances count tokens, whatever their positions",
    )


def _check_room(cache: Any, layer: int, rows: int, tokens: int) -> None:
    """Check that there are new tokens, and that the cache has this batch size and room for them."""
    if tokens == 0:
        raise ValueError(
            "`input_ids` must hold at least one token that is not in `past_key_values` yet, got "
            "none: continue a text by all of it so far and more, or start one with a new cache"
        )
    if layer >= len(cache.layers):
        return
    held = cache.layers[layer]
    keys = getattr(held, "keys", None)
    if keys is not None and keys.numel() > 0 and keys.shape[0] != rows:
        raise ValueError(
            f"`past_key_values` must keep the batch that it was filled with, {keys.shape[0]} "
            f"rows, got {rows} in layer {layer}: make a new cache for another batch, or change "
            "this one by `batch_select_indices` or `batch_repeat_interleave`"
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
    """Check that the pattern is the one that filled the cache: deeper keys were computed through
    it."""
    if layer < len(cache.layers) and isinstance(cache.layers[layer], BandLayer):
        cache.layers[layer].expects_bands = True
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
        if known is not None:
            raise ValueError(
                "`past_key_values` must have been filled under this layer's pattern "
                f"{pattern}, got {known} in layer {layer}"
            )
        raise ValueError(
            f"`past_key_values` must have been filled under this layer's pattern {pattern}, got "
            f"keys in layer {layer} of which nothing says so: they were computed by another "
            "attention, learned (prefix tuning, which bands do not support), or put into a new "
            "cache; if this model computed them under its bands, call "
            "`spattention.hf.trust_cache(cache, model)`"
        )
    filled_by[layer] = pattern


def _length(cache: Any, layer: int, unreadable: int = 1) -> int:
    """Number of keys in a layer of the cache; `unreadable` for a static cache in a compiled
    graph."""
    length = cache.get_seq_length(layer)
    if isinstance(length, torch.Tensor) and torch.compiler.is_compiling():
        return unreadable
    return int(length)
