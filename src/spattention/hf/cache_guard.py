"""Checks before each attention layer runs: its cache, and documents packed into its rows."""

from __future__ import annotations

from typing import Any

import torch

from ..bands import BandPattern
from ..checks import readable
from .config import NAME, read_section
from .decoder import plan_of
from .mask import add_restarts, is_packed

PACKED = f"{NAME}_packed"  # mark of a cache that was filled from packed rows
CACHE_ARGUMENTS = ("past_key_values", "layer_past")


def before_forward(
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
