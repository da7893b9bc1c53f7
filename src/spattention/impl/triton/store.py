# mypy: allow-untyped-defs
"""The newest tokens into the rings of a `BandStore`, in one launch: `spattention::triton_store`.

An operator of its own, because a compiler that functionalises indexed writes may copy the store to
do so.

B  rows        C  key/value heads        n  tokens        N  tokens of a block        D  head_dim
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..library import register
from . import memory
from .config import block_d
from .kernel import Kernel, kinds
from .launch import on_device, unit_rows

BLOCK_N = 32  # tokens


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
    blocks,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    head = program // blocks % heads
    row = program // blocks // heads
    length = tl.load(p_length + head)
    # The last tokens that the ring holds: of two for one slot only the later is written.
    first = tl.maximum(tokens - length, 0)
    o_token = first + program % blocks * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    if first + program % blocks * BLOCK_N < tokens:
        o_slot = (tl.load(p_position + row) + o_token) % length + tl.load(p_offset + head)
        p_from = p_token + row * token_row_stride + head * token_head_stride
        m_token = o_token < tokens
        b_token = memory.gather_rows(p_from, o_token, m_token, token_stride, HEAD_DIM, BLOCK_D)
        o_dim = tl.arange(0, BLOCK_D)
        m_token = m_token[:, None] & (o_dim < HEAD_DIM)[None, :]
        p_to = p_rings + row * ring_row_stride + o_slot[:, None] * ring_stride + o_dim[None, :]
        tl.store(p_to, b_token, mask=m_token)


_store = Kernel(store_kernel)


def _write(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    offsets: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """Tokens `[B, Hkv, n, D]` at positions from `position` on; the rest as in `BandStore`, whose
    buffers have contiguous rows.
    """
    batch, heads, tokens = key.shape[:3]
    if batch * heads * tokens == 0:
        return
    block = min(BLOCK_N, triton.next_power_of_2(tokens))
    blocks = triton.cdiv(tokens, block)
    with on_device(key.device):
        for rows, rings in ((key, keys), (value, values)):
            rows, head_dim = unit_rows(rows), rows.shape[-1]
            numbers = (*rows.stride()[:3], *rings.stride()[:2], heads, tokens, blocks)
            pointers = (rows, rings, position, offsets, lengths)
            _store(
                batch * heads * blocks,
                (key.device, kinds(*pointers), numbers),
                *pointers,
                *numbers,
                HEAD_DIM=head_dim,
                BLOCK_D=block_d(head_dim),
                BLOCK_N=block,
                num_warps=1 if block == 1 else 4,
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
    "(Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor position, "
    "Tensor offsets, Tensor lengths) -> ()",
    _write,
    _fake_write,
)
