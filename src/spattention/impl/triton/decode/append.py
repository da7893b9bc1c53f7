# mypy: allow-untyped-defs
"""Write new tokens into the rings of a `BandStore`, in one launch: `spattention::triton_store`.

It is an operator because a compiler that functionalises indexed writes may copy the store.

B  batch        C  key/value heads        n  tokens        N  tokens of a block        D  head_dim
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...library import register
from .. import memory
from ..arguments import Form, heads
from ..call import ensure_inner_contiguous, on_device
from ..compiled import CompiledKernelCache, specialization
from ..config import OPTIONS, block_d

BLOCK_N = 32  # tokens


class Rings(NamedTuple):
    """A store's buffer `[B, slots, D]`, the next position of each batch entry `[B]`, and first slot
    and length of each head's ring `[C]`.
    """

    buffer: Any
    stride_b: Any
    stride_t: Any
    position: Any
    offsets: Any
    lengths: Any


class AppendCounts(NamedTuple):
    """Sizes of a call."""

    n_heads: Any
    n_tokens: Any
    n_blocks: Any


@triton.jit
def append_kernel(
    tokens,  # Heads, [B, C, n, D]
    rings,
    counts,
    FORM: tl.constexpr,
):
    BLOCK_N: tl.constexpr = FORM.BLOCK_N
    program = tl.program_id(0).to(tl.int64)
    n_tokens, n_blocks = counts.n_tokens, counts.n_blocks
    head = program // n_blocks % counts.n_heads
    batch = program // n_blocks // counts.n_heads
    length = tl.load(rings.lengths + head)
    # The last tokens that fit the ring: of two for one slot only the later is written.
    first = tl.maximum(n_tokens - length, 0)
    o_token = first + program % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    if first + program % n_blocks * BLOCK_N < n_tokens:
        offset = tl.load(rings.offsets + head)
        o_slot = (tl.load(rings.position + batch) + o_token) % length + offset
        p_tokens = tokens.pointer + batch * tokens.stride_b + head * tokens.stride_h
        m_token = o_token < n_tokens
        b_token = memory.gather_tokens(p_tokens, o_token, m_token, tokens.stride_t, FORM)
        o_dim = tl.arange(0, FORM.BLOCK_D)
        m_token = m_token[:, None] & (o_dim < FORM.HEAD_DIM)[None, :]
        p_buffer = rings.buffer + batch * rings.stride_b
        p_slots = p_buffer + o_slot[:, None] * rings.stride_t + o_dim[None, :]
        tl.store(p_slots, b_token, mask=m_token)


_append = CompiledKernelCache(append_kernel)


def _write(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    offsets: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """Write tokens `[B, Hkv, n, D]` at positions from `position` on; the rest as in `BandStore`,
    whose buffers are contiguous in D.
    """
    batch, n_heads, n_tokens = key.shape[:3]
    if batch * n_heads * n_tokens == 0:
        return
    block = min(BLOCK_N, triton.next_power_of_2(n_tokens))
    counts = AppendCounts(n_heads, n_tokens, triton.cdiv(n_tokens, block))
    with on_device(key.device):
        for tokens, buffer in ((key, keys), (value, values)):
            tokens, head_dim = ensure_inner_contiguous(tokens), tokens.shape[-1]
            token_heads = heads(tokens)
            stride_b, stride_t, _ = buffer.stride()
            rings = Rings(buffer, stride_b, stride_t, position, offsets, lengths)
            _append(
                batch * n_heads * counts.n_blocks,
                (
                    key.device,
                    specialization(tokens, buffer, position, offsets, lengths),
                    token_heads[1:],
                    rings[1:3],
                    counts,
                ),
                token_heads,
                rings,
                counts,
                FORM=Form(head_dim, block_d(head_dim), BLOCK_N=block),
                num_warps=1 if block == 1 else 4,
                **OPTIONS,
            )


def _fake_write(*inputs: Any) -> None:
    return None


write = register(
    "triton_store",
    "(Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor position, "
    "Tensor offsets, Tensor lengths) -> ()",
    _write,
    _fake_write,
)
