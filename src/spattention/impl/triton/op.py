"""The PyTorch operators around the kernels: `spattention::triton_forward` and
`spattention::triton_backward`.

They take the bands as a flat `int[]`, near, far, near, far per head, and the prefix, because
schemas take no Python objects. Packed calls (`cu_seqlens_q` given) come as `[1, H, T, D]` views.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton

from ...compat.pytorch import needs_dispatcher
from ...compat.triton import RecordedLaunch, recorded_launches
from ..attention_call import AttentionCall, CallForm
from ..layout import empty_like_query
from ..library import batched, differentiable, register
from ..replay import Replay, bind_pass
from ..sinks import sink_weight
from . import launch
from .arguments import Positions
from .call import (
    BackwardTensors,
    Call,
    ForwardTensors,
    call_of,
    compute_capability,
    dense,
    ensure_inner_contiguous,
)
from .constants import ConstantCache, int32_table
from .decode.op import MAX_QUERIES

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
INTERPRETED = triton.knobs.runtime.interpret
_offsets = ConstantCache[torch.Tensor](max_entries=1024)


def refusal(query: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why these kernels cannot compute a call, or None if they can."""
    if query.device.type != "cuda" and not INTERPRETED:
        return f"needs CUDA tensors, got {query.device.type}"
    if query.dtype not in DTYPES:
        return f"computes float16, bfloat16 and float32, got {query.dtype}"
    if query.dtype == torch.float32 and torch.version.hip is not None:
        # Its library for Triton lacks the rounded product that scales scores in float32.
        return f"computes float16 and bfloat16 on ROCm, got {query.dtype}"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"computes head_dim up to {MAX_HEAD_DIM}, got {query.shape[-1]}"
    if value.shape[-1] != query.shape[-1]:
        return f"needs value's head_dim to be key's, {query.shape[-1]}, got {value.shape[-1]}"
    return None


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    intervals: Sequence[int],
    prefix: int,
    scale: float,
    query_start: int,
    deterministic: bool,
    query_start_tensor: torch.Tensor | None,
    key_start: torch.Tensor | None,
    sinks: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    form: CallForm | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`out [B, H, Q, D]` and the log-sum-exp, float32 `[B, H, Q]`.

    Args:
        query, key, value: `[B, H, Q, D]`, `[B, Hkv, K, D]` twice; packed calls have B = 1 and
            `cu_seqlens_q`, `cu_seqlens_k`.
        intervals: the bands, `BandPattern.flat`.
        prefix: `BandPattern.prefix`.
        scale: factor of the scores.
        query_start: position of the first query; used when `query_start_tensor` is None.
        deterministic: whether the gradients must have the same bits on every run.
        query_start_tensor: the same as int32 `[]` or `[B]`, read on the device.
        key_start: int32 `[B]` or `[B, Q]`.
        sinks: `[H]`.
        cu_seqlens_q, cu_seqlens_k: int32 `[documents + 1]`.
        form: the call's, where it did not come through the dispatcher.
    """
    out, lse = _forward_results(query)
    if out.numel() == 0:
        return out, lse
    given = query, key, value
    query, key, value = (ensure_inner_contiguous(each) for each in given)
    positions = Positions(query_start_tensor, key_start, cu_seqlens_q, cu_seqlens_k)
    facts = (query, key, intervals, scale, query_start, positions, prefix, form)
    call = call_of(*facts, deterministic=deterministic)
    tensors = ForwardTensors(query, key, value, out, lse, sinks)
    described = sinks is None and cu_seqlens_q is None
    if form is None or not described or not _needs_record(form, deterministic):
        launch.forward(call, tensors)
        return out, lse
    with recorded_launches() as recorded:
        launch.forward(call, tensors)
    options = intervals, prefix, scale, query_start, deterministic
    tensors = ForwardTensors(*given, out, lse, sinks)
    form.replays[deterministic] = _replay(recorded, tensors, options, positions, call, form)
    return out, lse


def _needs_record(form: CallForm, deterministic: bool) -> bool:
    """True from a form's second call on until it has a record: many come once, as lengths vary."""
    if deterministic not in form.replays:
        form.replays[deterministic] = None
        return False
    return form.replays[deterministic] is None


def _replay(
    recorded: Sequence[RecordedLaunch | None],
    tensors: ForwardTensors,
    options: tuple[Any, ...],
    positions: Positions,
    call: Call,
    form: CallForm,
) -> Replay | None:
    """How later calls of a form run, if launches are all that they need. Few queries may be decoded
    instead.
    """
    query, key, value, out, lse, *_ = tensors
    starts = positions[:2]
    given = [each for each in starts if each is not None]
    if (
        call.queries <= MAX_QUERIES
        or options[2] == 0.0  # the scale: gradients are filled with zeros
        or out.stride() != torch.empty_like(query).stride()
        or not all(each.is_contiguous() for each in given)
    ):
        return None
    found = bind_pass(recorded, (query, key, value, *given, out, lse), call.bands)
    if found is None:
        return None
    has_start, has_key_start = (each is not None for each in starts)

    def rest(given: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
        """The operator's arguments after query, key and value, or after `lse`."""
        start = given[0] if has_start else None
        key_start = given[-1] if has_key_start else None
        return *options, start, key_start, None, None, None

    def compute(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        everything: tuple[Any, ...] = (*inputs[:3], *rest(inputs[3:]), form)
        return _forward(*everything)

    def differentiate(d_out: torch.Tensor, *saved: torch.Tensor) -> Sequence[torch.Tensor]:
        return _gradients_anywhere(form, (d_out, None, *saved[:5], *rest(saved[5:])))[:3]

    return Replay(found, tuple(lse.shape), compute, differentiate, call.bands)


def _fake_forward(query: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward_results(query)


def _forward_results(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return empty_like_query(query, query.shape[3]), lse


def _gradients_of(
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    intervals: Sequence[int],
    prefix: int,
    scale: float,
    query_start: int,
    deterministic: bool,
    query_start_tensor: torch.Tensor | None,
    key_start: torch.Tensor | None,
    sinks: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    *,
    form: CallForm | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of query, key, value and sinks (None without sinks), from those of `out` and (or
    None) of `lse`.
    """
    d_query, d_key, d_value = (empty_like_query(t, t.shape[3]) for t in (query, key, value))
    d_sinks = None if sinks is None else torch.empty_like(sinks)
    if query.numel() == 0 or key.numel() == 0:
        for gradient in (d_query, d_key, d_value):
            gradient.zero_()
        if d_sinks is not None:
            d_sinks.zero_() if d_lse is None else d_sinks.copy_(d_lse.sum((0, 2)))
        return d_query, d_key, d_value, d_sinks
    query, key, value = (ensure_inner_contiguous(each) for each in (query, key, value))
    out, d_out = ensure_inner_contiguous(out), ensure_inner_contiguous(d_out)
    positions = Positions(query_start_tensor, key_start, cu_seqlens_q, cu_seqlens_k)
    facts = (query, key, intervals, scale, query_start, positions, prefix, form)
    call = call_of(*facts, deterministic=deterministic)
    tensors = BackwardTensors(query, key, value, out, d_out, d_query, d_key, d_value)
    delta = launch.backward(call, tensors, lse, d_lse)
    if scale == 0.0:
        d_query.zero_()
        d_key.zero_()
    if sinks is not None and d_sinks is not None:
        d_sinks.copy_(-(sink_weight(sinks.float()[:, None], lse) * delta).sum((0, 2)))
    return d_query, d_key, d_value, d_sinks


def _backward(
    d_out: torch.Tensor, d_lse: torch.Tensor | None, query: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`_gradients_of` in the form of a schema: without sinks their gradient is `[0]`."""
    d_query, d_key, d_value, d_sinks = _gradients_of(d_out, d_lse, query, *rest)
    return d_query, d_key, d_value, query.new_empty(0) if d_sinks is None else d_sinks


def _fake_backward(
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    sinks = rest[9]
    return (
        empty_like_query(query, query.shape[3]),
        empty_like_query(key, key.shape[3]),
        empty_like_query(value, value.shape[3]),
        query.new_empty(0) if sinks is None else torch.empty_like(sinks),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, intervals, prefix, scale, query_start, deterministic, *optional = inputs[:13]
    ctx.save_for_backward(query, key, value, *output, *optional)
    ctx.rest = intervals, prefix, scale, query_start, deterministic
    ctx.form = inputs[13] if len(inputs) > 13 else None
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, d_out: torch.Tensor | None, d_lse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    query, key, value, out, lse, *optional = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out
    inputs = (d_out, d_lse, query, key, value, out, lse, *ctx.rest, *optional)
    d_query, d_key, d_value, d_sinks = _gradients_anywhere(ctx.form, inputs)
    d_sinks = None if optional[2] is None else d_sinks
    return d_query, d_key, d_value, *[None] * 7, d_sinks, None, None


def _gradients_anywhere(form: CallForm | None, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """`_gradients_of`, through the dispatcher where something has to see the operator."""
    # With gradients on, someone wants a second derivative, which the operator refuses. What was
    # saved needed no dispatcher in the forward pass.
    if form is None or torch.is_grad_enabled() or needs_dispatcher(inputs[:2]):
        found: tuple[Any, ...] = backward(*inputs)
        return found
    return _gradients_of(*inputs, form=form)


class _Recorded(torch.autograd.Function):
    """The operator as autograd records it outside the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        inputs: tuple[Any, ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        found = _gradients(ctx, *gradients)
        return (*found[:3], found[10], None)


def as_document(call: AttentionCall) -> AttentionCall:
    """The call as one packed document, if the Hopper kernels run it in that form alone.

    Those are the last queries of a single row, such as a chunk of a prompt: a document's queries
    are its last positions, too.
    """
    batch, _, queries, _ = call.query.shape
    keys, device = call.key.shape[2], call.query.device
    if (
        call.form is None  # a compiler or a transform keeps what it was given
        or batch != 1
        or call.query_start == 0
        or call.query_start + queries != keys
        or call.query_start_tensor is not None
        or call.key_start is not None
        or call.cu_seqlens_q is not None
        or (compute_capability(device) or (0, 0))[0] != 9
    ):
        return call
    key = queries, keys
    offsets = _offsets.get(key, device, lambda: int32_table([[0, n] for n in key], device))
    return call._replace(query_start=0, cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1])


def attend(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` and the log-sum-exp, recorded for autograd."""
    call = as_document(call)
    query, key, value, sinks = call.query, call.key, call.value, dense(call.sinks)
    inputs = (
        query,
        key,
        value,
        call.pattern.flat,
        call.pattern.prefix,
        call.scale,
        call.query_start,
        call.deterministic,
        call.query_start_tensor,
        call.key_start,
        sinks,
        dense(call.cu_seqlens_q),
        dense(call.cu_seqlens_k),
    )
    if call.form is None:
        return forward(*inputs)
    needs_grad = query.requires_grad or key.requires_grad or value.requires_grad
    needs_grad = needs_grad or (sinks is not None and sinks.requires_grad)
    if needs_grad and torch.is_grad_enabled():
        return _Recorded.apply(query, key, value, sinks, (*inputs, call.form))
    return _forward(*inputs, call.form)


_COMMON = (
    "int[] intervals, int prefix, float scale, SymInt query_start, bool deterministic, "
    "Tensor? query_start_tensor, Tensor? key_start, Tensor? sinks, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
)
forward = register(
    "triton_forward",
    f"(Tensor query, Tensor key, Tensor value, {_COMMON}) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
backward = register(
    "triton_backward",
    "(Tensor d_out, Tensor? d_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    f"{_COMMON}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
differentiable(forward, _save, _gradients)
differentiable(backward)
batched(forward, packed="cu_seqlens_q")
batched(backward, packed="cu_seqlens_q", sums_sinks=True)
