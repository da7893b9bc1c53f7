# mypy: allow-untyped-defs
"""Joining a partial result to another in one pass over both.

M = BLOCK_M rows   D head_dim, padded to BLOCK_D
"""

import torch
import triton
import triton.language as tl

from .call import on_device

BLOCK_M = 64


@triton.jit
def merge_kernel(
    p_out,
    p_lse,
    p_part,
    p_part_lse,
    n_heads,
    n_rows,
    HEAD_DIM,
    out_b,
    out_h,
    out_t,
    lse_b,
    lse_h,
    lse_t,
    part_b,
    part_h,
    part_t,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows of one head: `out` and `lse` become those of both parts, which see disjoint keys."""
    head_batch = tl.program_id(1).to(tl.int64)
    batch, head = head_batch // n_heads, head_batch % n_heads
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    o_dim = tl.arange(0, BLOCK_D)  # [D]
    m_row = o_row < n_rows
    m_tile = m_row[:, None] & (o_dim < HEAD_DIM)[None, :]
    p_lse += batch * lse_b + head * lse_h + o_row * lse_t
    p_part_lse += head_batch * n_rows + o_row
    p_out += batch * out_b + head * out_h + o_row[:, None] * out_t + o_dim[None, :]
    p_part += batch * part_b + head * part_h + o_row[:, None] * part_t + o_dim[None, :]
    lse = tl.load(p_lse, mask=m_row, other=-float("inf"))
    part_lse = tl.load(p_part_lse, mask=m_row, other=-float("inf"))
    highest = tl.maximum(lse, part_lse)
    base = tl.where(highest == -float("inf"), 0.0, highest)
    weight, part_weight = tl.exp(lse - base), tl.exp(part_lse - base)
    total = tl.where(highest == -float("inf"), 1.0, weight + part_weight)
    # Rows that the part does not see keep their bits.
    m_row &= part_lse > -float("inf")
    m_tile &= m_row[:, None]
    share = part_weight / total
    out = tl.load(p_out, mask=m_tile, other=0.0).to(tl.float32)
    part = tl.load(p_part, mask=m_tile, other=0.0).to(tl.float32)
    out += share[:, None] * (part - out)
    tl.store(p_out, out.to(p_out.dtype.element_ty), mask=m_tile)
    tl.store(p_lse, base + tl.log(total), mask=m_row)


def merge(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Join a partial result `[B, H, Q, D]` and `[B, H, Q]` to `out` and `lse`, in place; arguments
    as in `impl.partial.merge_into`."""
    batch, heads, rows, head_dim = out.shape
    if out.stride(-1) != 1 or part.stride(-1) != 1:
        raise AssertionError("rows of head_dim are contiguous")
    if not out.numel():
        return
    with on_device(out.device):
        merge_kernel[(triton.cdiv(rows, BLOCK_M), batch * heads)](
            out,
            lse,
            part,
            part_lse.contiguous(),
            heads,
            rows,
            head_dim,
            *out.stride()[:3],
            *lse.stride(),
            *part.stride()[:3],
            BLOCK_M=BLOCK_M,
            BLOCK_D=triton.next_power_of_2(head_dim),
        )
