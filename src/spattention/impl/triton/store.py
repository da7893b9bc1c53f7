# mypy: allow-untyped-defs
"""The newest tokens into the rings of a `BandStore`, in one launch: `spattention::triton_store`.

An operator of its own, because a compiler that functionalises indexed writes may copy the store to
do so.

B  rows        C  key/value heads        n  tokens        D  head_dim
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import block_d
from .launch import on_device, unit_rows
from .op import register


@triton.jit
def store_kernel(
    p_token,  # [B, C, n, D]
    p_rings,  # [B, slots, D]
    p_position,  # [B], of the first token
    p_offset,  # [C]
    p_length,  # [C]
    token_row_stride,
    token_head_stride,
    token_stride,
    ring_row_stride,
    ring_stride,
    heads,
    tokens,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    token = program % tokens
    head = program // tokens % heads
    row = program // tokens // heads
    length = tl.load(p_length + head)
    slot = tl.load(p_offset + head) + (tl.load(p_position + row) + token) % tl.maximum(length, 1)
    o_dim = tl.arange(0, BLOCK_D)
    m_dim = o_dim < HEAD_DIM * tl.minimum(length, 1)  # nothing of a head without a ring
    p_from = p_token + row * token_row_stride + head * token_head_stride + token * token_stride
    b_token = tl.load(p_from + o_dim, mask=m_dim)
    tl.store(p_rings + row * ring_row_stride + slot * ring_stride + o_dim, b_token, mask=m_dim)


def _write(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    offsets: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """Tokens `[B, Hkv, n, D]` at positions from `position` on, n at most the shortest ring that is
    not empty; the rest as in `BandStore`, whose buffers have contiguous rows.
    """
    batch, heads, tokens = key.shape[:3]
    if batch * heads * tokens == 0:
        return
    with on_device(key.device):
        for rows, rings in ((key, keys), (value, values)):
            rows, head_dim = unit_rows(rows), rows.shape[-1]
            store_kernel[(batch * heads * tokens,)](
                rows,
                rings,
                position,
                offsets,
                lengths,
                *rows.stride()[:3],
                *rings.stride()[:2],
                heads,
                tokens,
                HEAD_DIM=head_dim,
                BLOCK_D=block_d(head_dim),
                num_warps=1,
            )


def _fake_write(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    offsets: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    return None


write = register(
    "triton_store",
    "Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor position, "
    "Tensor offsets, Tensor lengths) -> ()",
    _write,
    _fake_write,
)
