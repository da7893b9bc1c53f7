"""The launches of the Hopper kernels. Imported only where `hopper.plan` made a plan: Gluon is
experimental, and another Triton may lack a part of it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .. import varlen
from ..arguments import Form, Positions, RowStats, heads
from ..call import BackwardTensors, Call, ForwardTensors, on_device
from ..compiled import CompiledKernelCache, specialization
from . import backward as backward_pass
from . import backward_preprocess, forward_persistent, fused_backward, query_sums
from . import forward as forward_pass
from .planning import BLOCK, KEYS_FUSED, HopperPlan, TileOrder, pitch

VECTOR_LAYOUT = gl.NVMMASharedLayout(0, 32, 1)
GLUON_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}

_forward = CompiledKernelCache(forward_pass.forward_kernel)
_forward_persistent = CompiledKernelCache(forward_persistent.forward_kernel)
_preprocess = CompiledKernelCache(backward_preprocess.preprocess_kernel)
_backward = CompiledKernelCache(backward_pass.backward_kernel)
_fused_backward = CompiledKernelCache(fused_backward.fused_backward_kernel)
_finish = CompiledKernelCache(query_sums.finish_kernel)


class _Descriptor(TensorDescriptor):
    """A tensor descriptor without the checks of its constructor, because several are made in every
    call. They are those of rank, block shape, alignment and inner stride; `planning.readable` has
    checked alignment, and the rest follows from how `_descriptor` makes it.
    """

    def __post_init__(self) -> None:
        pass


def _descriptor(tensor: torch.Tensor, tokens: int) -> TensorDescriptor:
    """The descriptor of blocks of `tokens` tokens of a `[B, H, tokens, D]` tensor; what is outside
    reads as 0.
    """
    head_dim = tensor.shape[3]
    strides = list(tensor.stride())
    for axis in range(3):
        if tensor.shape[axis] == 1:  # never used, but must be valid
            strides[axis] = head_dim
    block, layout = _block_layout(tokens, head_dim, tensor.dtype)
    return _Descriptor(tensor, list(tensor.shape), strides, block, layout)


@lru_cache(maxsize=64)
def _block_layout(
    tokens: int, head_dim: int, dtype: torch.dtype
) -> tuple[list[int], gl.NVMMASharedLayout]:
    block = [1, 1, tokens, head_dim]
    return block, gl.NVMMASharedLayout.get_default_for(block, GLUON_DTYPES[dtype])


def _vector_descriptor(tensor: torch.Tensor, length: int) -> TensorDescriptor:
    """The descriptor of `length` consecutive elements of a contiguous float32 tensor."""
    return _Descriptor(tensor, [tensor.numel()], [1], [length], VECTOR_LAYOUT)


def forward(call: Call, plan: HopperPlan, tensors: ForwardTensors) -> None:
    """Launch the forward kernel of a plan; fills `out` and `lse`."""
    query, key, value, out, lse, sinks = tensors
    launches = plan.launches
    launch = launches.forward_persistent if plan.persistent else launches.forward
    n_blocks = varlen.num_slots(call.queries, call.n_documents, launch.block_m)
    programs = n_blocks * call.batch * call.heads
    results = heads(out)
    tensors_in = (
        _descriptor(query, BLOCK if plan.persistent else launch.block_m),
        _descriptor(key, launch.block_n),
        _descriptor(value, launch.block_n),
        results,
        lse,
        call.bands[0],
        sinks,
    )
    # The fields of `ForwardCounts`
    counts = (
        call.heads,
        call.group,
        call.batch,
        n_blocks,
        call.queries,
        call.keys,
        plan.order.value,
    )
    form = _forward_form(
        call.head_dim,
        launch.block_m,
        launch.block_n,
        launch.num_stages if plan.persistent else 0,
        call.n_intervals,
        call.prefix,
        sinks is not None,
        call.scale < 0,
        *_bounds(call),
    )
    positions = _positions(call)
    specialization_key = (
        call.device,
        call.dtype,
        specialization(out, lse, sinks, *positions),
        results[1:],
    )
    with on_device(call.device):
        if not plan.persistent:
            _forward(
                programs,
                specialization_key,
                *tensors_in,
                positions,
                *counts,
                call.scale,
                FORM=form,
                **launch.options,
            )
            return
        properties = torch.cuda.get_device_properties(call.device)
        _forward_persistent(
            min(programs, properties.multi_processor_count),
            specialization_key,
            *tensors_in,
            *counts,
            programs,
            call.scale,
            FORM=form,
            **launch.options,
        )


def backward(call: Call, plan: HopperPlan, tensors: BackwardTensors, stats: RowStats) -> None:
    """Launch the backward kernels of a plan; they fill the gradients, `lse_log2` and `delta`."""
    query, key, value, out, d_out, d_query, d_key, d_value = tensors
    launch = plan.launches.backward
    n_query_blocks = varlen.num_slots(call.queries, call.n_documents, launch.block_m)
    block_n = KEYS_FUSED if plan.fused_backward else launch.block_n
    n_key_blocks = varlen.num_slots(call.keys, call.n_documents, block_n)
    programs = n_query_blocks * call.batch * call.heads
    key_programs = n_key_blocks * call.batch * call.key_heads
    inputs = (
        _descriptor(query, launch.block_m),
        _descriptor(key, launch.block_n),
        _descriptor(value, launch.block_n),
        _descriptor(d_out, launch.block_m),
    )
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
    facts = (
        call.head_dim,
        launch.block_m,
        launch.block_n,
        call.n_intervals,
        call.prefix,
        call.group > 1,
        stats.d_lse is not None,
        *_bounds(call),
    )
    positions = _positions(call)
    results, grad_results = heads(out), heads(d_out)
    gradients = (heads(d_query), heads(d_key), heads(d_value))
    sums, turns = _query_sums(call, programs) if plan.fused_backward else (None, None)
    specialization_key = (
        call.device,
        call.dtype,
        specialization(out, d_out, *stats, d_query, d_key, d_value, *positions),
        results[1:],
        grad_results[1:],
        *[gradient[1:] for gradient in gradients],
    )
    vectors = (
        _vector_descriptor(stats.lse_log2, launch.block_m),
        _vector_descriptor(stats.delta, launch.block_m),
    )

    def form(compute_delta: bool) -> Form:
        found = _backward_form(*facts, compute_delta, plan.fused_backward, turns is not None)
        return found if call.has_all_keys else found._replace(EXACT_STEPS=0)

    def run(programs: int, key_programs: int, compute_delta: bool) -> None:
        _backward(
            programs,
            specialization_key,
            *inputs,
            *vectors,
            results,
            *gradients,
            stats,
            call.bands,
            positions,
            *counts,
            key_programs,
            call.scale,
            FORM=form(compute_delta),
            launch_pdl=True,
            **launch.options,
        )

    with on_device(call.device):
        if plan.split_backward and not plan.fused_backward:
            run(programs, 0, True)
            run(key_programs, key_programs, False)
            return
        _preprocess(
            programs,
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
            *counts,
            key_programs,
            call.scale,
            FORM=form(False),
            launch_pdl=True,
            **launch.options,
        )
        if not plan.fused_backward:
            run(key_programs + programs, key_programs, False)
            return
        _fused_backward(
            key_programs,
            specialization_key,
            *inputs,
            *vectors,
            *gradients,
            sums,
            turns,
            call.bands[1],
            *counts,
            key_programs,
            call.scale,
            FORM=form(False),
            launch_pdl=True,
            **launch.options,
        )
        if turns is None:
            _finish(
                programs,
                specialization_key,
                sums,
                gradients[0],
                call.heads,
                n_query_blocks,
                call.queries,
                call.scale,
                FORM=form(False),
                **launch.options,
            )


def _query_sums(call: Call, blocks: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Memory for the sums of dQ of blocks of queries and, if they have an order, the turns that are
    over.
    """
    like = {"device": call.device}
    sums = torch.empty(blocks * BLOCK * call.head_dim, dtype=torch.float32, **like)
    turns = torch.empty(4 * blocks, dtype=torch.int32, **like) if call.deterministic else None
    return sums, turns


def _positions(call: Call) -> Positions:
    """The positions as the kernels read them."""
    key_start = call.positions.key_start
    return call.positions._replace(key_start=None if key_start is None else key_start.contiguous())


def _bounds(call: Call) -> tuple[bool, bool]:
    """`Form.PACKED` and `Form.HAS_KEY_START`."""
    return call.n_documents > 0, call.positions.key_start is not None


@lru_cache(maxsize=256)
def _forward_form(
    head_dim: int,
    block_m: int,
    block_n: int,
    stages: int,
    n_intervals: int,
    prefix: int,
    has_sinks: bool,
    falling: bool,
    packed: bool,
    has_key_start: bool,
) -> Form:
    """The forward kernel's `Form`; cached, because it takes longer to make than to look up."""
    return Form(
        HEAD_DIM=head_dim,
        BLOCK_D=head_dim,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        STAGES=stages,
        INTERVALS=n_intervals,
        PREFIX=prefix,
        PACKED=packed,
        HAS_KEY_START=has_key_start,
        HAS_SINKS=has_sinks,
        FALLING=falling,
    )


@lru_cache(maxsize=256)
def _backward_form(
    head_dim: int,
    block_m: int,
    block_n: int,
    n_intervals: int,
    prefix: int,
    grouped: bool,
    has_d_lse: bool,
    packed: bool,
    has_key_start: bool,
    compute_delta: bool,
    fused: bool,
    ordered: bool,
) -> Form:
    """The backward kernels' `Form`, cached like the forward kernel's."""
    return Form(
        HEAD_DIM=head_dim,
        BLOCK_D=head_dim,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        INTERVALS=n_intervals,
        PREFIX=prefix,
        GROUPED=grouped,
        PACKED=packed,
        HAS_KEY_START=has_key_start,
        HAS_D_LSE=has_d_lse,
        COMPUTE_DELTA=compute_delta,
        FUSED=fused,
        ORDERED=ordered,
    )
