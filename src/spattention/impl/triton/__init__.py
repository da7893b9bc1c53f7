"""Triton kernels for CUDA GPUs: forward and backward for every `BandPattern`, in half and single
precision.

Three suites of kernels stand on a shared ground (`tiles.py`, `scheduler.py`, `varlen.py`,
`arguments.py`, `softmax.py`, `memory.py`, `config.py`, `compiled.py`, `call.py`):

    portable/  every call, on every GPU
    hopper/    training and the first pass over a prompt on Hopper GPUs, in Gluon
    decode/    few queries against many keys, and writing into a `BandStore`

`launch.py` chooses between the first two, and `op.py` registers their operators. Start with
`tiles.py`, `softmax.py` and `portable/forward.py`.

Decoding is chosen for at most 16 queries, with at least 8 keys for each, where no input needs a
gradient. Its first call with a pattern, a batch size and a number of queries makes a table on the
device. That call cannot be inside the capture of a CUDA graph: call once to warm up.

float32 is computed in IEEE float32, not TensorFloat32. All kernels give the same bits on every run,
except `hopper/fused_backward.py` with `deterministic=False`.
"""

from __future__ import annotations

import torch

from ...bands import BandPattern
from ...compat.pytorch import in_transform
from ..attention_call import AttentionCall
from . import launch, op, paged
from .arguments import Positions
from .call import Call, dense, ensure_inner_contiguous
from .decode import append
from .decode import op as decode_op
from .decode.op import MAX_QUERIES
from .hopper.planning import BOX, covers
from .op import refusal
from .parts import attend_part, differentiate_part

__all__ = [
    "MAX_QUERIES",
    "attend",
    "attend_paged",
    "attend_paged_documents",
    "attend_part",
    "attend_rings",
    "describe",
    "differentiate_part",
    "prefers_copies",
    "reads_pages",
    "refusal",
    "write_rings",
]

# New tokens of a request, on average, up to which the portable kernel is faster in place: a copy of
# the keys takes as long for few queries as for many, and a step in place longer than over a copy.
MAX_PORTABLE_TOKENS = 512
# Queries that read a key, on average, up to which the kernels for Hopper are faster in place.
MAX_READS_IN_PLACE = 3500
DECODE_KEYS = 8  # keys per query from which on decoding is faster


def attend(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[B, H, Q, D]` and log-sum-exp `[B, H, Q]`, recorded for autograd."""
    if not _is_decoding(call):
        return op.attend(call)
    return decode_op.decode(
        call.query,
        call.key,
        call.value,
        call.pattern.flat,
        call.pattern.prefix,
        call.scale,
        call.query_start,
        call.query_start_tensor,
        call.key_start,
        dense(call.sinks),
        None,
        None,
        None,
        None,
    )


def attend_rings(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pattern: BandPattern,
    *,
    offsets: torch.Tensor,
    lengths: torch.Tensor,
    prefixes: torch.Tensor,
    documents: torch.Tensor,
    position: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None,
    key_start: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the last tokens of a `BandStore`; results as in `spattention.band_attention`,
    without a gradient.

    Args:
        query: `[B, H, Q, D]`, at most `MAX_QUERIES` tokens and at most one more than the store's
            slack.
        keys, values, offsets, lengths, position: the store's.
        pattern: the store's.
        prefixes: int64 `[Hkv]`, first slot of each head's prefix.
        documents: int64 `[B, n]`, the store's; the last column says where the document of these
            prefixes starts.
        scale: factor of the scores.
        sinks: `[H]`.
        key_start: int32 `[B]` or `[B, Q]`.
    """
    assert query.shape[2] <= MAX_QUERIES
    return decode_op.decode(
        query,
        keys,
        values,
        pattern.flat,
        pattern.prefix,
        scale,
        0,
        position,
        key_start,
        dense(sinks),
        offsets,
        lengths,
        prefixes if pattern.prefix else None,
        documents[:, -1] if pattern.prefix else None,
    )


def attend_paged(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    pattern: BandPattern,
    *,
    scale: float,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Fill `out` and `lse` with attention of the last tokens of each entry to a paged cache; no
    gradient. Arguments are those of `spattention.serving.paged_attention`.
    """
    assert query.shape[2] <= MAX_QUERIES
    flat, prefix, sinks = pattern.flat, pattern.prefix, dense(sinks)
    decode_op.decode_paged(
        query, key, value, block_table, seq_lens, flat, prefix, scale, sinks, out, lse
    )


def reads_pages(query: torch.Tensor, page: int, new_tokens: int) -> bool:
    """True where reading pages of this many tokens in place is the rule, for queries like this
    `[..., D]`, of which requests have this many on average. The Hopper kernels read pages of whole
    boxes; others are copied for them, since they are much faster than the portable ones.
    """
    if covers(query):
        return page % BOX == 0
    return new_tokens <= MAX_PORTABLE_TOKENS


def prefers_copies(pattern: BandPattern, new_tokens: int, longest: int) -> bool:
    """True where copies of the keys are faster to read than pages that `reads_pages` allows: those
    of heads that see most keys, with many new tokens. A copy is then shared by many queries.

    Args:
        pattern: the bands.
        new_tokens: of a request, on average.
        longest: the most tokens of a request, the new ones included.
    """
    if new_tokens <= MAX_READS_IN_PLACE:  # none is read by more
        return False
    middle, flat = longest - new_tokens // 2, pattern.flat
    widths = [min(far, middle) - min(near, middle) for near, far in zip(flat[::2], flat[1::2])]
    read = min(longest, max(flat) + new_tokens)
    return new_tokens * sum(widths) > MAX_READS_IN_PLACE * read * pattern.num_heads


def attend_paged_documents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    max_seqlen_k: int,
    pattern: BandPattern,
    *,
    scale: float,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Fill `out [T, H, D]` with attention of the last tokens of each request, as many as
    `cu_seqlens_q` says, to a paged cache; no gradient. Arguments are those of
    `paged.attend_documents`.
    """
    assert key.stride(-1) == value.stride(-1) == 1  # pages are read as they are, never copied
    requests = cu_seqlens_q, block_table, seq_lens, max_seqlen_k
    paged.attend_documents(query, key, value, *requests, pattern, scale, dense(sinks), out)


def write_rings(
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    offsets: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """Write the next tokens `[B, Hkv, n, D]` into a `BandStore`, in place. The other arguments are
    the store's, as they are before these tokens.
    """
    append.write(key, value, keys, values, position, offsets, lengths)


def describe(call: AttentionCall) -> tuple[str, str | None]:
    """Name of the kernels that `attend` runs, and what the Hopper kernels would need instead; None
    if there are no faster ones. Launches nothing.
    """
    if _is_decoding(call):
        return launch.DECODING, None
    call = op.as_document(call)
    query, key, value = (ensure_inner_contiguous(t) for t in (call.query, call.key, call.value))
    positions = Positions(
        call.query_start_tensor, call.key_start, call.cu_seqlens_q, call.cu_seqlens_k
    )
    facts = Call(
        query,
        key,
        call.pattern.flat,
        call.scale,
        call.query_start,
        positions,
        call.pattern.prefix,
        deterministic=call.deterministic,
    )
    return launch.describe(facts, query, key, value)


def _is_decoding(call: AttentionCall) -> bool:
    queries = call.query.shape[2]
    if queries > MAX_QUERIES or call.key.shape[2] < DECODE_KEYS * queries:
        return False
    if call.cu_seqlens_q is not None:
        return False
    if in_transform():
        return False  # what `vmap` wraps does not show whether it needs a gradient
    inputs = [t for t in (call.query, call.key, call.value, call.sinks) if t is not None]
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs))
