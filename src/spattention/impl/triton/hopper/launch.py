"""The launches of the Hopper kernels. Imported only where `hopper.plan` made a plan: Gluon is
experimental, and another Triton may lack a part of it.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .. import varlen
from ..arguments import Form, Positions, RowStats, heads
from ..call import BackwardTensors, Call, ForwardTensors, on_device
from ..compiled import CompiledKernelCache, specialization
from ..config import OPTIONS
from . import backward as backward_pass
from . import (
    backward_preprocess,
    documents,
    forward_persistent,
    forward_queue,
    fused_backward,
    prefix,
    query_sums,
)
from . import forward as forward_pass
from .arguments import BackwardStats
from .planning import (
    BLOCK,
    QUERY_GRADIENT_REGISTERS,
    HopperPlan,
    TileOrder,
    has_parts,
    keys_fused,
    max_documents,
    pitch,
)

VECTOR_LAYOUT = gl.NVMMASharedLayout(0, 32, 1)
GLUON_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}

_forward = CompiledKernelCache(forward_pass.forward_kernel)
_forward_persistent = CompiledKernelCache(forward_persistent.forward_kernel)
_reset = CompiledKernelCache(forward_queue.reset_kernel)
_preprocess = CompiledKernelCache(backward_preprocess.preprocess_kernel)
_backward = CompiledKernelCache(backward_pass.backward_kernel)
_fused_backward = CompiledKernelCache(fused_backward.fused_backward_kernel)
_finish = CompiledKernelCache(query_sums.finish_kernel)
_documents = CompiledKernelCache(documents.documents_kernel)
_sum_parts = CompiledKernelCache(prefix.sum_parts_kernel)


class _Box:
    """Shape, strides, block and layout of a descriptor; equal ones are one object."""

    def __init__(
        self,
        shape: list[int],
        strides: list[int],
        block_shape: list[int],
        layout: gl.NVMMASharedLayout,
    ) -> None:
        self.shape, self.strides = shape, strides
        self.block_shape, self.layout = block_shape, layout


class _Descriptor(TensorDescriptor):
    """A tensor descriptor without the checks of its constructor, because several are made in every
    call. They are those of rank, block shape, alignment and inner stride; `planning.readable` has
    checked alignment, and the rest follows from how `_box` and `_vector_box` make it.
    """

    def __init__(self, base: torch.Tensor, box: _Box) -> None:
        self.base, self.box = base, box

    shape = property(lambda self: self.box.shape)
    strides = property(lambda self: self.box.strides)
    block_shape = property(lambda self: self.box.block_shape)
    layout = property(lambda self: self.box.layout)


def _descriptor(tensor: torch.Tensor, tokens: int) -> TensorDescriptor:
    """The descriptor of blocks of `tokens` tokens of a `[B, H, tokens, D]` tensor; what is outside
    reads as 0.
    """
    return _Descriptor(tensor, _box(tensor.shape, tensor.stride(), tokens, tensor.dtype))


@lru_cache(maxsize=1024)
def _box(shape: torch.Size, strides: tuple[int, ...], tokens: int, dtype: torch.dtype) -> _Box:
    head_dim = shape[3]
    # Strides of dimensions of size 1 are never used, but must be valid.
    valid = [head_dim if size == 1 else stride for size, stride in zip(shape[:3], strides)]
    block = [1, 1, tokens, head_dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, GLUON_DTYPES[dtype])
    return _Box(list(shape), [*valid, strides[3]], block, layout)


def _vector_descriptor(tensor: torch.Tensor, length: int) -> TensorDescriptor:
    """The descriptor of `length` consecutive elements of a contiguous float32 tensor."""
    return _Descriptor(tensor, _vector_box(tensor.numel(), length))


@lru_cache(maxsize=1024)
def _vector_box(elements: int, length: int) -> _Box:
    return _Box([elements], [1], [length], VECTOR_LAYOUT)


def find_documents(call: Call) -> tuple[Call, Call]:
    """The call over the documents that the first keys of each row describe, and the call over the
    rows where they describe none, which the portable kernels compute.
    """
    key_start = call.positions.key_start
    assert key_start is not None
    n_documents = max_documents(call.queries)
    offsets = key_start.new_empty((2 * n_documents + 3) * call.batch)
    offsets_q, offsets_k, described = offsets.split(
        [(n_documents + 1) * call.batch] * 2 + [call.batch]
    )
    with on_device(call.device):
        _documents(
            call.batch,
            (call.device, specialization(key_start, offsets_q, offsets_k), call.start_strides),
            key_start,
            *call.start_strides[1:],
            offsets_q,
            offsets_k,
            described,
            call.queries,
            n_documents,
            num_warps=8,
            **OPTIONS,
        )
    positions = Positions(None, None, offsets_q, offsets_k)
    rest = call.positions._replace(described=described)
    return call.variant("documents", positions, n_documents), call.variant("rest", rest)


class _ForwardLaunch(NamedTuple):
    """Facts of a forward launch that are the same in every call of a form."""

    plan: HopperPlan
    has_sinks: bool
    programs: int
    query_tokens: int
    key_tokens: int
    counts: tuple[int, ...]
    constants: dict[str, Any]
    draws: bool


def _forward_launch(call: Call, plan: HopperPlan, has_sinks: bool) -> _ForwardLaunch:
    found: _ForwardLaunch | None = call.derived.get("hopper forward")
    if found is not None and found.plan is plan and found.has_sinks == has_sinks:
        return found
    launch = plan.launches.forward_persistent if plan.persistent else plan.launches.forward
    n_blocks = varlen.num_slots(call.queries, call.n_documents, launch.block_m)
    programs = n_blocks * call.batch * call.heads
    # The fields of `ForwardCounts`
    counts: tuple[int, ...] = (
        call.heads,
        call.group,
        call.batch,
        n_blocks,
        call.queries,
        call.keys,
        plan.order.value,
    )
    draws = plan.persistent and plan.waves == 1
    if plan.persistent:
        counts = (*counts, programs)
        properties = torch.cuda.get_device_properties(call.device)
        programs = min(programs, plan.waves * properties.multi_processor_count)
    form = Form(
        HEAD_DIM=call.head_dim,
        BLOCK_D=call.head_dim,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        STAGES=launch.num_stages if plan.persistent else 0,
        INTERVALS=call.n_intervals,
        PREFIX=call.prefix,
        **_bounds(call),
        HAS_SINKS=has_sinks,
        FALLING=call.scale < 0,
        PAGE=call.page,
    )
    found = call.derived["hopper forward"] = _ForwardLaunch(
        plan,
        has_sinks,
        programs,
        BLOCK if plan.persistent else launch.block_m,
        math.gcd(call.page, launch.block_n),
        counts,
        {"FORM": form, **launch.options, **({"launch_pdl": True} if draws else {})},
        draws,
    )
    return found


def forward(call: Call, plan: HopperPlan, tensors: ForwardTensors) -> None:
    """Launch the forward kernel of a plan; fills `out`, `lse` and `remainder`."""
    query, key, value, out, lse, sinks, remainder = tensors
    launch = _forward_launch(call, plan, sinks is not None)
    results, positions = heads(out), _positions(call)
    drawn = lse.new_empty(1, dtype=torch.int32) if launch.draws else None
    with on_device(call.device):
        if drawn is not None:
            _reset(1, (call.device, specialization(drawn)), drawn, num_warps=1, **OPTIONS)
        (_forward_persistent if plan.persistent else _forward)(
            launch.programs,
            (
                call.device,
                specialization(out, remainder, lse, sinks, drawn, *positions),
                results[1:],
            ),
            _descriptor(query, launch.query_tokens),
            _descriptor(key, launch.key_tokens),
            _descriptor(value, launch.key_tokens),
            results,
            remainder,
            lse,
            call.bands_by_head,
            sinks,
            drawn if plan.persistent else positions,
            *launch.counts,
            call.scale,
            **launch.constants,
        )


class _BackwardLaunch(NamedTuple):
    """Facts of the backward launches that are the same in every call of a form.

    `constants` are those of programs that read `delta`, `computing_delta` of those that compute it,
    `fused` of `fused_backward.py`;
    `sum_programs` and `sum_counts` belong to the sums of a prefix's parts.
    """

    plan: HopperPlan
    has_d_lse: bool
    query_programs: int
    key_programs: int
    counts: tuple[int, ...]
    constants: dict[str, Any]
    computing_delta: dict[str, Any]
    fused: dict[str, Any]
    sum_programs: int
    sum_counts: tuple[int, ...]


def _backward_launch(call: Call, plan: HopperPlan, has_d_lse: bool) -> _BackwardLaunch:
    found: _BackwardLaunch | None = call.derived.get("hopper backward")
    if found is not None and found.plan is plan and found.has_d_lse == has_d_lse:
        return found
    launch = plan.launches.backward
    n_query_blocks = varlen.num_slots(call.queries, call.n_documents, launch.block_m)
    block_n = keys_fused(call) if plan.fused_backward else launch.block_n
    n_key_blocks = varlen.num_slots(call.keys, call.n_documents, block_n)
    form = Form(
        HEAD_DIM=call.head_dim,
        BLOCK_D=call.head_dim,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        INTERVALS=call.n_intervals,
        PREFIX=call.prefix,
        GROUPED=call.group > 1,
        **_bounds(call),
        HAS_D_LSE=has_d_lse,
        FUSED=plan.fused_backward,
        ORDERED=plan.fused_backward and call.deterministic,
    )
    if not call.has_all_keys:
        form = form._replace(EXACT_STEPS=0)
    # The fields of `BackwardCounts`, except the last
    counts = (
        call.heads,
        call.group,
        call.batch,
        n_query_blocks,
        call.queries,
        call.keys,
        min(plan.order, TileOrder.ROUND_ROBIN).value,
        pitch(call.queries),
        n_key_blocks,
    )
    options = {"launch_pdl": True, **launch.options}
    limit = {}
    if call.head_dim in QUERY_GRADIENT_REGISTERS and (call.prefix or any(_bounds(call).values())):
        limit["maxnreg"] = QUERY_GRADIENT_REGISTERS[call.head_dim]  # else it needs fewer
    found = call.derived["hopper backward"] = _BackwardLaunch(
        plan,
        has_d_lse,
        n_query_blocks * call.batch * call.heads,
        n_key_blocks * call.batch * call.key_heads,
        counts,
        {"FORM": form, **options},
        {"FORM": form._replace(COMPUTE_DELTA=True), **options, **limit},
        {"FORM": form._replace(BLOCK_N=block_n), **options},
        2 * call.prefix * call.batch * call.key_heads * (call.head_dim // prefix.COLUMNS.value),
        (call.heads, call.group, call.batch, n_query_blocks, call.queries, call.keys),
    )
    return found


def backward(call: Call, plan: HopperPlan, tensors: BackwardTensors, stats: RowStats) -> None:
    """Launch the backward kernels of a plan; they fill the gradients, `lse_log2` and `delta`. Those
    of a prefix's keys are left to `portable/prefix_gradient.py` unless `has_parts`.
    """
    query, key, value, out, d_out, d_query, d_key, d_value = tensors
    launch = _backward_launch(call, plan, stats.d_lse is not None)
    blocks = plan.launches.backward
    inputs = (
        _descriptor(query, blocks.block_m),
        _descriptor(key, blocks.block_n),
        _descriptor(value, blocks.block_n),
        _descriptor(d_out, blocks.block_m),
    )
    positions = _positions(call)
    results, grad_results = heads(out), heads(d_out)
    gradients = (heads(d_query), heads(d_key), heads(d_value))
    part = None
    if has_parts(call):
        part = stats.delta.new_empty((launch.query_programs, 2, call.prefix, call.head_dim))
    specialization_key = (
        call.device,
        specialization(out, d_out, *stats, d_query, d_key, d_value, part, *positions),
        results[1:],
        grad_results[1:],
        *[gradient[1:] for gradient in gradients],
    )
    descriptors = (
        *inputs,
        _vector_descriptor(stats.lse_log2, blocks.block_m),
        _vector_descriptor(stats.delta, blocks.block_m),
    )
    sums, turns = None, None
    if plan.fused_backward:
        if call.deterministic:
            turns = stats.delta.new_empty(launch.query_programs, dtype=torch.int32)
        sums = stats.delta.new_empty((launch.query_programs, BLOCK, call.head_dim))
    arguments = (
        *descriptors,
        results,
        *gradients,
        BackwardStats(*stats, part),
        call.bands,
        positions,
        *launch.counts,
    )

    def run(programs: int, key_programs: int, constants: dict[str, Any]) -> None:
        _backward(programs, specialization_key, *arguments, key_programs, call.scale, **constants)

    def run_fused() -> None:
        _fused_backward(
            launch.key_programs,
            specialization_key,
            *descriptors,
            *gradients,
            sums,
            turns,
            call.bands_by_key_head,
            *launch.counts,
            launch.key_programs,
            call.scale,
            **launch.fused,
        )
        if call.deterministic:
            return
        _finish(
            launch.query_programs,
            specialization_key,
            sums,
            gradients[0],
            call.heads,
            launch.counts[3],  # blocks of queries
            call.queries,
            call.scale,
            FORM=launch.constants["FORM"],
            **blocks.options,
        )

    with on_device(call.device):
        if plan.split_backward and not plan.fused_backward:
            run(launch.query_programs, 0, launch.computing_delta)
            run(launch.key_programs, launch.key_programs, launch.constants)
        else:
            _preprocess(
                launch.query_programs,
                specialization_key,
                *inputs,
                results,
                grad_results,
                stats,
                gradients[0],
                sums,
                turns,
                call.bands,
                positions,
                *launch.counts,
                launch.key_programs,
                call.scale,
                **launch.constants,
            )
            if plan.fused_backward:
                run_fused()
            else:
                programs = launch.key_programs + launch.query_programs
                run(programs, launch.key_programs, launch.constants)
        if part is not None:
            _sum_parts(
                launch.sum_programs,
                specialization_key,
                *gradients[1:],
                part,
                call.bands_by_key_head,
                positions,
                *launch.sum_counts,
                call.scale,
                FORM=launch.constants["FORM"],
                **blocks.options,
            )


def _positions(call: Call) -> Positions:
    """The positions as the kernels read them."""
    key_start = call.positions.key_start
    if key_start is None:
        return call.positions
    return call.positions._replace(key_start=key_start.contiguous())


def _bounds(call: Call) -> dict[str, bool]:
    """Entries of `Form` that say whether a batch entry holds tokens of other sequences."""
    return {
        "PACKED": call.n_documents > 0,
        "HAS_KEY_START": call.positions.key_start is not None,
    }
