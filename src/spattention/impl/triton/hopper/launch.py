"""The launches of the Hopper kernels. Imported only where `config.hopper_launches` chose them:
Gluon is experimental, and another Triton may lack a part of it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..compiled import Kernel, kinds
from ..config import HOPPER_BLOCK, LaunchConfig
from . import backward as hopper_backward
from . import backward_preprocess as hopper_rows
from . import forward as hopper_forward
from . import forward_persistent as hopper_long

if TYPE_CHECKING:
    from ..launch import Call

VECTOR_LAYOUT = gl.NVMMASharedLayout(0, 32, 1)
GLUON_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}

_forward = Kernel(hopper_forward.forward_kernel)
_long = Kernel(hopper_long.forward_kernel)
_rows = Kernel(hopper_rows.rows_kernel)
_gradient = Kernel(hopper_backward.gradient_kernel)


class _Descriptor(TensorDescriptor):
    """What `_describable` has checked is not checked again: several are made in every call."""

    def __post_init__(self) -> None:
        pass


def _descriptor(tensor: torch.Tensor, rows: int) -> TensorDescriptor:
    """Of blocks of `rows` tokens of a `[B, H, tokens, D]` tensor; what lies outside reads as 0."""
    head_dim = tensor.shape[3]
    strides = list(tensor.stride())
    for axis in range(3):
        if tensor.shape[axis] == 1:  # never used, but must be valid
            strides[axis] = head_dim
    block, layout = _block_layout(rows, head_dim, tensor.dtype)
    return _Descriptor(tensor, list(tensor.shape), strides, block, layout)


@lru_cache(maxsize=64)
def _block_layout(
    rows: int, head_dim: int, dtype: torch.dtype
) -> tuple[list[int], gl.NVMMASharedLayout]:
    block = [1, 1, rows, head_dim]
    return block, gl.NVMMASharedLayout.get_default_for(block, GLUON_DTYPES[dtype])


def _vector_descriptor(tensor: torch.Tensor, rows: int) -> TensorDescriptor:
    """Of `rows` consecutive elements of a contiguous float32 tensor."""
    return _Descriptor(tensor, [tensor.numel()], [1], [rows], VECTOR_LAYOUT)


def forward(
    call: Call,
    launch: LaunchConfig,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    sinks: torch.Tensor | None,
) -> None:
    """Writes `out` and `lse`."""
    slots = call.query_slots(launch.block_m)
    blocks = slots * call.batch * call.heads
    descriptors = (
        _descriptor(query, HOPPER_BLOCK if call.long else launch.block_m),
        _descriptor(key, launch.block_n),
        _descriptor(value, launch.block_n),
    )
    tensors = (out, lse, call.bands[0], sinks, *out.stride()[:3], *call.hopper_counts(slots))
    options = {
        "HAS_SINKS": sinks is not None,
        "FALLING": call.scale < 0,
        **call.hopper_options(launch),
    }
    depends = (call.device, query.dtype, kinds(out, lse, sinks), out.stride())
    if not call.long:
        _forward(blocks, depends, *descriptors, *tensors, call.order, call.scale, **options)
        return
    programs = min(blocks, call.multiprocessors)
    stages = launch.num_stages
    _long(programs, depends, *descriptors, *tensors, blocks, call.scale, STAGES=stages, **options)


def gradients(
    call: Call,
    launch: LaunchConfig,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    d_out: torch.Tensor,
    d_query: torch.Tensor,
    d_key: torch.Tensor,
    d_value: torch.Tensor,
    lse: torch.Tensor,
    d_lse: torch.Tensor | None,
    base: torch.Tensor,
    delta: torch.Tensor,
) -> None:
    """Writes the gradients, `base` and `delta`."""
    slots, key_slots = call.query_slots(launch.block_m), call.key_slots(launch.block_n)
    programs = slots * call.batch * call.heads
    key_programs = key_slots * call.batch * call.key_heads
    t_query, t_d_out = _descriptor(query, launch.block_m), _descriptor(d_out, launch.block_m)
    t_key, t_value = _descriptor(key, launch.block_n), _descriptor(value, launch.block_n)
    t_base = _vector_descriptor(base, launch.block_m)
    t_delta = _vector_descriptor(delta, launch.block_m)
    counts = (*call.hopper_counts(slots), min(call.order, 1))
    options = {
        "HAS_D_LSE": d_lse is not None,
        "launch_pdl": True,
        **call.hopper_options(launch),
    }
    depends = (
        call.device,
        query.dtype,
        kinds(out, d_out, lse, d_lse, base, delta, d_query, d_key, d_value),
        out.stride(),
        d_out.stride(),
        d_query.stride(),
        d_key.stride(),
        d_value.stride(),
    )
    if not call.apart:
        _rows(
            programs,
            depends,
            t_query,
            t_key,
            t_value,
            t_d_out,
            out,
            d_out,
            lse,
            d_lse,
            base,
            delta,
            call.bands,
            *out.stride()[:3],
            *d_out.stride()[:3],
            *counts,
            base.shape[2],
            call.scale,
            **options,
        )

    def run(programs: int, key_programs: int, with_rows: bool) -> None:
        _gradient(
            programs,
            depends,
            t_query,
            t_key,
            t_value,
            t_d_out,
            t_base,
            t_delta,
            out,
            lse,
            d_lse,
            base,
            delta,
            d_query,
            d_key,
            d_value,
            call.bands,
            *out.stride()[:3],
            *d_query.stride()[:3],
            *d_key.stride()[:3],
            *d_value.stride()[:3],
            *counts,
            base.shape[2],
            key_slots,
            key_programs,
            call.scale,
            GROUPED=call.heads != call.key_heads,
            WITH_ROWS=with_rows,
            **options,
        )

    if call.apart:
        run(programs, 0, True)
        run(key_programs, key_programs, False)
    else:
        run(key_programs + programs, key_programs, False)
