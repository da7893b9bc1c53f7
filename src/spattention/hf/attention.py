"""The attention function of `attn_implementation="spattention"`."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention import band_attention, band_attention_varlen
from ..bands import BandPattern
from ..padding import padding_first, reorder, restore
from .cache import BandHandle
from .context_parallel import SHARDS, attend_shards, is_context_parallel
from .decoder import has_sinks, plan_of
from .mask import Rows, decode, dense_mask
from .packing import PACKING, check_packing
from .sinks import current_sinks
from .tensor_parallel import head_shard

# Keywords that models pass on to their attention functions and that do not say who attends whom.
WITHOUT_EFFECT = frozenset(
    {
        "assistant_tokenizer",  # of `generate`
        "cache_position",
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",  # read where the mask is made and in `cache_guard`
        "return_dict",
        "shift_labels",
        "seq_idx",  # the documents of `position_ids`, for layers that are not attention
        "sliding_window",  # a layer with a pattern has no window of its own any more
        "tokenizer",  # of `generate`, with stop strings and token healing
        "use_cache",
    }
)
HONOURED = frozenset({"is_causal", "output_attentions", "s_aux", "softcap", SHARDS, *PACKING})


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
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
    pattern, sinks = plan.pattern, _sinks(module, keywords)
    heads = query.shape[1]
    if heads != pattern.num_heads:
        shard = head_shard(module)
        if shard is None or shard.ranks * heads != pattern.num_heads:
            raise ValueError(
                f"`pattern` has {pattern.num_heads} heads but `query` has {heads}: under tensor "
                'parallelism other than `tp_plan="auto"` give each rank its part, '
                "`pattern.heads(start, stop)`"
            )
        pattern = shard.part(pattern, heads)
        if sinks is not None and sinks.shape[0] != heads:
            sinks = shard.sinks(sinks, heads)
    packed = any(keywords.get(name) is not None for name in PACKING)
    options: dict[str, Any] = {"scale": scaling, "sinks": sinks}
    if is_context_parallel(module):
        out = attend_shards(query, key, value, pattern, keywords.get(SHARDS), **options)
    elif isinstance(key, BandHandle):
        if packed:
            raise ValueError(
                f"`past_key_values` must not be a BandCache with `{PACKING[0]}`: flattened rows "
                "cannot be continued"
            )
        out = key.attend(query, pattern, rows, **options)
    elif packed:
        out = _packed(query, key, value, pattern, rows, keywords, **options)
    else:
        out = _by_rows(query, key, value, pattern, rows, **options)
    return out.transpose(1, 2), None


def _by_rows(
    query: Tensor, key: Tensor, value: Tensor, pattern: BandPattern, rows: Rows, **options: Any
) -> Tensor:
    """Attention `[B, H, Q, Dv]` to the given keys: one text per row, or packed documents, separated
    by the first key of each query. Options are scale and sinks."""
    if rows.source is not None:
        return _between_padding(query, key, value, pattern, rows, **options)
    options |= {"query_start": rows.query_start, "key_start": rows.key_start}
    out = band_attention(query, key, value, pattern, **options)
    assert isinstance(out, Tensor)  # no log-sum-exp was asked for
    return out


def _between_padding(
    query: Tensor, key: Tensor, value: Tensor, pattern: BandPattern, rows: Rows, **options: Any
) -> Tensor:
    """Attention `[B, H, Q, Dv]` with padding between tokens. Padding moves to the left end of its
    row, so that distances count tokens alone. Its own rows of the result are 0."""
    source, valid = rows.source, rows.valid_queries(query.shape[2])
    assert source is not None
    assert valid is not None
    if source.shape[1] != key.shape[2]:
        raise ValueError(
            f"`attention_mask` must have a column for each of the {key.shape[2]} keys, got "
            f"{source.shape[1]}"
        )
    padding = ~valid[:, None, :, None]
    order = padding_first(valid)
    # Moved padding can see keys of its row: a NaN in its query would reach their gradients.
    query = reorder(query.masked_fill(padding, 0.0), order)
    key, value = reorder(key, source), reorder(value, source)
    moved = replace(rows, valid=None, source=None)
    out = _by_rows(query, key, value, pattern, moved, **options)
    return restore(out, order).masked_fill(padding, 0.0)


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: BandPattern,
    rows: Rows,
    keywords: dict[str, Any],
    **options: Any,
) -> Tensor:
    """Documents flattened into one row, with FlashAttention's offsets."""
    check_packing(keywords, rows.padded)
    if query.shape[0] != 1 or key.shape[2] != query.shape[2] or rows.query_start is not None:
        raise ValueError(
            "`cu_seq_lens_q` must describe one row [1, T] without a filled cache, "
            f"got {query.shape[0]} rows of {query.shape[2]} queries and {key.shape[2]} keys"
        )
    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    offsets = [keywords[name].to(torch.int32) for name in PACKING[:2]]
    longest = [int(keywords[name]) for name in PACKING[2:]]
    out = band_attention_varlen(query, key, value, pattern, *offsets, *longest, **options)
    assert isinstance(out, Tensor)
    return out.transpose(0, 1)[None]


def _own_attention(
    implementation: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Rows,
    scaling: float | None,
    dropout: float,
    keywords: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """A layer without a pattern: the model's implementation, with the mask that it would have."""
    offsets = keywords.get("cu_seq_lens_k")
    if offsets is not None and rows.key_start is None:
        tokens = torch.arange(key.shape[2], device=key.device)
        document = torch.searchsorted(offsets[1:].contiguous(), tokens, right=True)
        rows = Rows(offsets[document.clamp(max=len(offsets) - 1)][None], rows.query_start)
    window = keywords.get("sliding_window")
    lengths = query.shape[2], key.shape[2]
    plain = rows.plain and lengths[0] in (1, lengths[1]) and (window or lengths[1]) >= lengths[1]
    mask: Tensor | None
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


def _dropout_fields(config: Any) -> str:
    """The entries of a config that set attention's dropout, as keywords of `from_pretrained`."""
    names = [name for name in vars(config) if re.search("^att.*drop", name)]
    return " and ".join(f"`{name}=0.0`" for name in names or ["attention_dropout"])


def _check_keywords(module: torch.nn.Module, dropout: float, keywords: dict[str, Any]) -> None:
    if dropout > 0:
        raise ValueError(
            f"attention dropout must be 0 for spattention, got {dropout}: load the model with "
            f"{_dropout_fields(module.config)}, or put that into its config.json; a model that is "
            "built already keeps its own"
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


def _sinks(module: torch.nn.Module, keywords: dict[str, Any]) -> Tensor | None:
    """The layer's own sinks (`s_aux`, as in gpt-oss) or those from `apply`."""
    sinks = keywords.get("s_aux")
    if sinks is None and has_sinks(module):
        sinks = current_sinks(module)
    # The operator takes query's dtype or float32, and a parameter may have neither: a bfloat16 one
    # under float16 autocast, or where rotary positions make queries float32.
    return sinks if sinks is None or sinks.dtype == torch.float64 else sinks.float()
