"""The public operators: bind the arguments, choose an implementation, call it."""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

import torch

from . import impl as implementations
from .bands import BandPattern
from .binding import bind, bind_varlen, form_of
from .checks import check_no_tangents
from .impl import blockwise, reference
from .impl.attention_call import AttentionCall
from .impl.layout import without_autocast
from .scalars import as_flag

IMPLEMENTATIONS = ("reference", "blockwise", "triton")
HAS_TRITON = find_spec("triton") is not None

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def band_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: BandPattern,
    *,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    query_start: int | torch.Tensor | None = None,
    key_start: torch.Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    impl: str | None = None,
) -> Result:
    """Softmax attention in which every head sees only the distances in its bands.

    Query i sits at position `p = query_start + i` and sees key j when `p - j` lies in one of its
    head's intervals and `j >= key_start`. With a prefix of n tokens it also sees the first n keys
    from `key_start` on, up to its own position, in every head that has an interval. Keys after the
    last query are never read: the unfilled tail of a cache may hold anything, NaN included. A query
    that sees no key gives output 0.

    Args:
        query: `[B, H, Q, D]`, floating point, any strides.
        key: `[B, Hkv, K, D]`, query's dtype; `H % Hkv == 0`, query head h reads key head
            `h // (H // Hkv)`.
        value: `[B, Hkv, K, Dv]`, query's dtype. Implementations that are kernels need `Dv == D`.
        pattern: the bands, one entry per query head.
        scale: factor of the scores before the softmax; default `1 / sqrt(D)`.
        sinks: `[H]` learned logits, unscaled, query's dtype or float32; each joins its head's
            denominator without a value. -inf is none; NaN gives NaN in its head, as in a query.
        query_start: position of the first query: an int, or an int32
            tensor `[]` or `[B]` on query's device. Default `K - Q`: the queries are the last
            positions.
        key_start: int32 `[B]` (left padding) or `[B, Q]`, never decreasing along Q (documents
            packed inside a row), on query's device: the first key that may be seen. Clamped to
            `[0, K]`.
        return_lse: also return the natural log-sum-exp, with the sinks in it: float32 (float64 for
            float64 input) `[B, H, Q]`; -inf for an empty row without sinks. It is differentiable.
        deterministic: True gives the same bits on every run; False allows a faster backward where
            there is one.
        impl: name of an implementation, which runs or raises; None chooses, see Dispatch.

    Returns:
        `out [B, H, Q, Dv]`, or `(out, lse)`; `out` has query's dtype and memory layout, and a
        contiguous head_dim.

    Raises:
        ValueError: if an argument breaks a rule above, or `query_start` exceeds 2**29 in kernels;
            on the CPU the values of tensors are checked too (`spattention.validate` checks them on
            any device).
        NotImplementedError: in forward-mode differentiation, except by `"reference"`.

    Dispatch:
        `impl=None` runs the first of these that covers the call.

        1. `"triton"`: kernels, for CUDA tensors where Triton can be imported, in float16, bfloat16
           or float32, with head_dim up to 256 and `Dv == D`. At most 16 queries, with at least 8
           keys for each, run its decoding kernel if no input needs a gradient.
        2. `"blockwise"`: pure PyTorch, any device, memory linear in the length.

        `"reference"`, the specification with its dense mask, runs by name alone.

    Under autocast, query, key and value are cast to autocast's dtype, as
    `scaled_dot_product_attention` does. Second derivatives are not available, except from
    `"reference"`.
    """
    if type(deterministic) is not bool or type(return_lse) is not bool:
        deterministic = as_flag("deterministic", deterministic)
        return_lse = as_flag("return_lse", return_lse)
    form = form_of(query, key, value, pattern, scale, (sinks, query_start, key_start))
    if form is not None and not return_lse and (impl is None or impl == "triton"):
        replay = form.replays.get(deterministic)
        if replay is not None:
            return replay.attend(query, key, value, query_start, key_start)
    call = bind(
        query,
        key,
        value,
        pattern,
        scale=scale,
        sinks=sinks,
        query_start=query_start,
        key_start=key_start,
        form=form,
    )
    if not deterministic:
        call = call._replace(deterministic=False)
    out, lse = attend(call, choose(impl, call.query, call.value))
    return (out, lse) if return_lse else out


def band_attention_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: BandPattern,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    impl: str | None = None,
) -> Result:
    """`band_attention` over packed documents, each attending within itself, in FlashAttention's
    conventions.

    In each document the queries are the last positions: query i of n_q over n_k keys sits at
    `n_k - n_q + i`. Each document has its own prefix, its first keys.

    Args:
        query: `[T, H, D]`, floating point.
        key: `[T_k, Hkv, D]`, query's dtype, `H % Hkv == 0`.
        value: `[T_k, Hkv, Dv]`, query's dtype.
        pattern: the bands, one entry per query head.
        cu_seqlens_q: int32 `[documents + 1]`, offsets of the documents in `query`, from 0 to T,
            never decreasing. On a GPU tokens past the last offset give zeros.
        cu_seqlens_k: the same for `key` and `value`; a document has at least as many keys as
            queries.
        max_seqlen_q: at least the queries of the longest document.
        max_seqlen_k: at least the keys of the longest document.
        scale: factor of the scores before the softmax; default `1 / sqrt(D)`.
        sinks: `[H]`, as in `band_attention`.
        return_lse: also return the log-sum-exp, `[H, T]`.
        deterministic: as in `band_attention`.
        impl: as in `band_attention`.

    Returns:
        `out [T, H, Dv]`, or `(out, lse)`; `out` has query's dtype and memory layout, and a
        contiguous head_dim.

    Raises:
        ValueError: if an argument breaks a rule above.
        NotImplementedError: as in `band_attention`.
    """
    if type(deterministic) is not bool or type(return_lse) is not bool:
        deterministic = as_flag("deterministic", deterministic)
        return_lse = as_flag("return_lse", return_lse)
    call = bind_varlen(
        query,
        key,
        value,
        pattern,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale=scale,
        sinks=sinks,
    )
    if not deterministic:
        call = call._replace(deterministic=False)
    out, lse = attend(call, choose(impl, call.query, call.value))
    out, lse = out.squeeze(0).transpose(0, 1), lse.squeeze(0)
    return (out, lse) if return_lse else out


def attend(call: AttentionCall, implementation: ModuleType) -> tuple[torch.Tensor, torch.Tensor]:
    """`(out, lse)` of a bound call."""
    if implementation is not reference:
        check_no_tangents(query=call.query, key=call.key, value=call.value, sinks=call.sinks)
    with without_autocast(call.query):
        result: tuple[torch.Tensor, torch.Tensor] = implementation.attend(call)
    return result


def choose(impl: str | None, query: torch.Tensor, value: torch.Tensor) -> ModuleType:
    """The implementation of this name, or by the rule of `band_attention`.

    Raises:
        ValueError: if there is no such implementation, or it cannot compute these tensors.
    """
    if impl is None:
        return kernels_for(query, value) or blockwise
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"`impl` must be None or one of {IMPLEMENTATIONS}, got {impl!r}")
    if impl == "triton":
        reason = refusal(query, value)
        if reason is not None:
            raise ValueError(f'`impl="triton"` {reason}')
        return _kernels()
    return reference if impl == "reference" else blockwise


def kernels_for(query: torch.Tensor, value: torch.Tensor) -> ModuleType | None:
    """`impl.triton`, where the rule of `band_attention` chooses it."""
    return None if not query.is_cuda or refusal(query, value) else _kernels()


def refusal(query: torch.Tensor, value: torch.Tensor) -> str | None:
    """The reason why the Triton kernels do not take these tensors, or None if they do."""
    if not HAS_TRITON:
        return 'needs Triton: pip install "spattention[gpu]"'
    found: str | None = _kernels().refusal(query, value)
    return found


def _kernels() -> ModuleType:
    """Imported on first use: a bare `import spattention` does not import Triton."""
    # An import statement would take microseconds in every call.
    found: ModuleType | None = getattr(implementations, "triton", None)
    if found is None:
        from .impl import triton as found
    assert found is not None
    return found
