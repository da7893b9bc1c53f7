"""The launches of the portable kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import varlen
from ..arguments import Form, Heads, RowStats, heads
from ..call import BackwardTensors, Call, ForwardTensors, on_device
from ..compiled import CompiledKernelCache, specialization
from ..config import OPTIONS, LaunchConfig, Launches, block_d, launches, prefix_chunk, prefix_launch
from .forward import forward_kernel
from .key_gradient import key_gradient_kernel
from .prefix_gradient import ROWS, PrefixCounts, prefix_gradient_kernel, reduce_kernel
from .query_gradient import query_gradient_kernel

_forward = CompiledKernelCache(forward_kernel)
_query_gradient = CompiledKernelCache(query_gradient_kernel)
_key_gradient = CompiledKernelCache(key_gradient_kernel)
_prefix_gradient = CompiledKernelCache(prefix_gradient_kernel)
_reduce = CompiledKernelCache(reduce_kernel)


def launches_for(call: Call) -> Launches:
    """The launches that the rule chooses for a call."""
    first_keys = call.positions.key_start is not None
    return launches(call.itemsize, call.head_dim, call.capability, first_keys)


class _Prepared(NamedTuple):
    """Facts of a launch that are the same in every call of a form.

    `flag` is a fact that is not the call's. `counts` are the fields of `arguments.Counts`.
    """

    launch: LaunchConfig
    flag: bool
    slots: int
    counts: tuple[int, ...]
    constants: dict[str, Any]


def _prepared(
    call: Call, name: str, launch: LaunchConfig, flag: bool, make: Callable[[], _Prepared]
) -> _Prepared:
    """The facts that `make` gives, made once per call, launch and flag."""
    found: _Prepared | None = call.derived.get(name)
    if found is None or found.launch is not launch or found.flag != flag:
        found = call.derived[name] = make()
    return found


def _prepare(
    call: Call,
    launch: LaunchConfig,
    slots: int,
    *,
    flag: bool = False,
    documents: bool | None = None,
    **facts: Any,
) -> _Prepared:
    """Facts of a launch with `slots` slots; `documents` and other facts as in `Form`."""
    query_start, key_start, cu_seqlens_q, _, described, *_ = call.positions
    # Without a prefix no kernel depends on documents.
    documents = call.prefix > 0 and _has_documents(call) and documents is not False
    form = Form(
        HEAD_DIM=call.head_dim,
        BLOCK_D=block_d(call.head_dim),
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        INTERVALS=call.n_intervals,
        PREFIX=call.prefix,
        DOCUMENTS=documents,
        PACKED=cu_seqlens_q is not None,
        START_ON_DEVICE=query_start is not None,
        HAS_KEY_START=key_start is not None,
        UNLESS_DESCRIBED=described is not None,
        PRECISE=call.precise,
        **facts,
    )
    counts = (
        *call.start_strides,
        call.heads,
        call.group,
        call.batch,
        call.n_documents,
        slots,
        call.queries,
        call.keys,
        call.query_start,
    )
    constants = {"FORM": form, "num_stages": launch.num_stages, **launch.options}
    return _Prepared(launch, flag, slots, counts, constants)


def forward(call: Call, launch: LaunchConfig, tensors: ForwardTensors) -> None:
    """Launch the forward kernel; fills `out`, `lse` and `remainder`."""
    query, key, value, out, lse, sinks, remainder = tensors
    has_sinks = sinks is not None

    def prepare() -> _Prepared:
        slots = varlen.num_slots(call.queries, call.n_documents, launch.block_m)
        falling = call.scale < 0
        facts: dict[str, Any] = {"HAS_SINKS": has_sinks, "FALLING": falling, "PAGE": call.page}
        return _prepare(call, launch, slots, flag=has_sinks, **facts)

    prepared = _prepared(call, "forward", launch, has_sinks, prepare)
    arguments = (heads(query), heads(key), heads(value), heads(out))
    with on_device(call.device):
        _forward(
            prepared.slots * call.batch * call.heads,
            _specialization_key(call, arguments, remainder, lse, sinks),
            *arguments,
            remainder,
            lse,
            call.bands_by_head,
            sinks,
            call.positions,
            *prepared.counts,
            call.scale,
            **prepared.constants,
        )


def backward(call: Call, launches: Launches, tensors: BackwardTensors, stats: RowStats) -> None:
    """Launch the gradient kernels; they fill the gradients, `lse_log2` and `delta`."""
    query_gradient(call, launches.query_gradient, tensors, stats)
    key_gradient(call, launches.key_gradient, tensors, stats)
    if call.prefix:
        prefix_gradient(call, launches.key_gradient, tensors, stats)


def query_gradient(
    call: Call, launch: LaunchConfig, tensors: BackwardTensors, stats: RowStats
) -> None:
    """Launch the kernel of dQ; fills `d_query`, `lse_log2` and `delta`."""
    query, key, value, out, d_out, d_query, _, _ = tensors
    has_d_lse = stats.d_lse is not None

    def prepare() -> _Prepared:
        slots = varlen.num_slots(call.queries, call.n_documents, launch.block_m)
        facts: dict[str, Any] = {"HAS_D_LSE": has_d_lse} | (
            {} if call.has_all_keys else {"EXACT_STEPS": 0}
        )
        return _prepare(call, launch, slots, flag=has_d_lse, **facts)

    prepared = _prepared(call, "query_gradient", launch, has_d_lse, prepare)
    arguments = (
        heads(query),
        heads(key),
        heads(value),
        heads(out),
        heads(d_out),
        heads(d_query),
    )
    with on_device(call.device):
        _query_gradient(
            prepared.slots * call.batch * call.heads,
            _specialization_key(call, arguments, *stats),
            *arguments,
            stats,
            call.bands_by_head,
            call.positions,
            *prepared.counts,
            call.scale,
            **prepared.constants,
        )


def key_gradient(
    call: Call, launch: LaunchConfig, tensors: BackwardTensors, stats: RowStats
) -> None:
    """Launch the kernel of dK and dV, after that of dQ; fills `d_key` and `d_value`."""
    query, key, value, _, d_out, _, d_key, d_value = tensors
    stats = RowStats(None, None, stats.lse_log2, stats.delta)

    def prepare() -> _Prepared:
        slots = varlen.num_slots(call.keys, call.n_documents, launch.block_n)
        chunk = prefix_chunk(call.capability) if call.prefix else 0
        return _prepare(call, launch, slots, GROUPED=call.group > 1, CHUNK=chunk)

    prepared = _prepared(call, "key_gradient", launch, False, prepare)
    arguments = (
        heads(query),
        heads(key),
        heads(value),
        heads(d_out),
        heads(d_key),
        heads(d_value),
    )
    with on_device(call.device):
        _key_gradient(
            prepared.slots * call.batch * call.key_heads,
            _specialization_key(call, arguments, *stats),
            *arguments,
            stats,
            call.bands_by_key_head,
            call.positions,
            *prepared.counts,
            call.scale,
            **prepared.constants,
        )


def prefix_gradient(
    call: Call,
    launch: LaunchConfig,
    tensors: BackwardTensors,
    stats: RowStats,
    *,
    shared: bool = True,
) -> None:
    """Launch the kernels that add the gradients of the prefix to `d_key` and `d_value`, after those
    of dQ and of dK and dV. `stats` may have more rows per head than queries.

    Args:
        shared: the portable kernel of dK and dV ran before, which computes the prefixes of short
            documents itself. Those for Hopper compute none.
    """
    shared = shared and _has_documents(call)
    query, key, value, _, d_out, _, d_key, d_value = tensors
    stats = RowStats(None, None, stats.lse_log2, stats.delta)
    if not shared:  # else these kernels share their blocks with dK and dV
        launch = prefix_launch(launch, call.prefix)
    chunk = prefix_chunk(call.capability)
    slots = varlen.num_slots(call.queries, call.n_documents, chunk)
    blocks = -(-call.prefix // launch.block_n)
    if call.positions.key_start is not None:  # a prefix may start inside of a block
        blocks = (call.prefix - 2) // launch.block_n + 2
    by_query = call.start_strides[2] != 0
    members = (1 + by_query) * blocks
    programs = slots * members * call.batch * call.key_heads
    part = stats.delta.new_empty((programs, 2, launch.block_n, call.head_dim))
    sizes = PrefixCounts(stats.delta.shape[2], blocks, members)
    inputs = (heads(query), heads(key), heads(value), heads(d_out))
    results = (heads(d_key), heads(d_value))
    facts: dict[str, Any] = {"GROUPED": call.group > 1, "CHUNK": chunk}
    prepared = _prepare(call, launch, slots, documents=shared, **facts)
    with on_device(call.device):
        _prefix_gradient(
            programs,
            _specialization_key(call, inputs, part, *stats),
            *inputs,
            part,
            stats,
            call.bands_by_key_head,
            call.positions,
            *prepared.counts,
            *sizes,
            call.scale,
            **prepared.constants,
        )
        _reduce(
            programs * launch.block_n // ROWS.value,
            _specialization_key(call, results, part),
            *results,
            part,
            call.bands_by_key_head,
            call.positions,
            *prepared.counts,
            *sizes,
            FORM=prepared.constants["FORM"],
            num_warps=4,
            **OPTIONS,
        )


def _specialization_key(
    call: Call, arguments: tuple[Heads, ...], *rest: torch.Tensor | None
) -> tuple[Any, ...]:
    return (
        call.device,
        call.start_strides,
        specialization(*[each.pointer for each in arguments], *rest, *call.positions),
        *[each[1:] for each in arguments],
    )


def _has_documents(call: Call) -> bool:
    """True if a row may hold several documents."""
    return call.positions.cu_seqlens_q is not None or call.start_strides[2] != 0
