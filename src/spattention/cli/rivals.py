"""Competitors of `bench attention`: dense attention, FlexAttention, FlashAttention-4."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..attention import band_attention
from ..bands import BandPattern

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Attend:
    """A call on fixed inputs, and the gradients of them.

    Args:
        forward: gives the output, whose layout is that of the inputs.
        inputs: query, key, value, and the output's gradient.
    """

    forward: Callable[[], torch.Tensor]
    inputs: Tensors

    def __call__(self) -> torch.Tensor:
        return self.forward()

    def backward(self, out: torch.Tensor) -> None:
        torch.autograd.grad(out, self.inputs[:3], self.inputs[3])


def bands(inputs: Tensors, pattern: BandPattern) -> Attend:
    """This library's kernels."""
    query, key, value, _ = inputs

    def attend() -> torch.Tensor:
        out = band_attention(query, key, value, pattern, impl="triton")
        assert isinstance(out, torch.Tensor)
        return out

    return Attend(attend, inputs)


def dense(inputs: Tensors) -> dict[str, Attend]:
    """PyTorch's, by back end; cuDNN's is the first."""
    query, key, value, _ = inputs

    def on(backend: SDPBackend) -> Attend:
        def attend() -> torch.Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, is_causal=True
                )

        return Attend(attend, inputs)

    return {
        "cuDNN": on(SDPBackend.CUDNN_ATTENTION),
        "FlashAttention": on(SDPBackend.FLASH_ATTENTION),
    }


def _block_mask(pattern: BandPattern, length: int) -> Any:
    """FlexAttention's, over blocks of 128. The bands are tensors, so that patterns share compiled
    code.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    near_0, far_0, near_1, far_1 = (edge.contiguous() for edge in _edges(pattern).unbind(1))

    def seen(
        batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, column: torch.Tensor
    ) -> torch.Tensor:
        distance = row - column
        first = (distance >= near_0[head]) & (distance < far_0[head])
        return first | ((distance >= near_1[head]) & (distance < far_1[head]))

    return create_block_mask(seen, None, len(near_0), length, length, "cuda", _compile=True)


def _edges(pattern: BandPattern) -> torch.Tensor:
    return torch.tensor(pattern.flat, device="cuda", dtype=torch.int32).view(-1, 4)


class Flex:
    """Compiled FlexAttention for one shape."""

    name = "FlexAttention"

    def __init__(self, inputs: Tensors) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        torch.compiler.reset()
        self.inputs = inputs
        self.attend = torch.compile(flex_attention, dynamic=False)

    def on(self, pattern: BandPattern) -> Attend:
        """On the mask of a pattern."""
        query, key, value, _ = self.inputs
        mask = _block_mask(pattern, query.shape[2])
        return Attend(lambda: self.attend(query, key, value, block_mask=mask), self.inputs)


class Flash4:
    """FlashAttention-4 in its own layout `[B, N, H, D]`; its backward adds in any order."""

    name = "FlashAttention-4"
    package = "flash-attn-4"

    def __init__(self, inputs: Tensors) -> None:
        moved = [tensor.detach().transpose(1, 2).contiguous() for tensor in inputs]
        self.inputs = (*(tensor.requires_grad_() for tensor in moved[:3]), moved[3])

    @staticmethod
    def is_installed() -> bool:
        return (
            importlib.util.find_spec("flash_attn") is not None
            and importlib.util.find_spec("flash_attn.cute") is not None
        )

    @property
    def dense(self) -> Attend:
        """With its causal mask."""
        return self._attend(causal=True)

    def on(self, pattern: BandPattern) -> Attend:
        """On the mask of a pattern: blocks that no query needs are left out."""
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        mask = _block_mask(pattern, self.inputs[0].shape[1])
        size = mask.BLOCK_SIZE
        by_query = BlockSparseTensorsTorch(
            mask.kv_num_blocks,
            mask.kv_indices,
            mask.full_kv_num_blocks,
            mask.full_kv_indices,
            block_size=size,
        )
        by_key = BlockSparseTensorsTorch(
            mask.q_num_blocks,
            mask.q_indices,
            mask.full_q_num_blocks,
            mask.full_q_indices,
            block_size=size,
        )
        return self._attend(
            mask_mod=_seen(),
            aux_tensors=[_edges(pattern)],
            block_sparse_tensors=by_query,
            block_sparse_tensors_bwd=by_key,
        )

    def _attend(self, **options: Any) -> Attend:
        from flash_attn.cute import flash_attn_func

        query, key, value, _ = self.inputs
        return Attend(lambda: flash_attn_func(query, key, value, **options)[0], self.inputs)


@cache
def _seen() -> Any:
    """The mask inside of blocks at an edge, compiled by CuTe."""
    import cutlass
    from cutlass import cute
    from flash_attn.cute.utils import scalar_to_ssa

    @cute.jit
    def seen(batch, head, row, column, seqlen_info, tensors):  # type: ignore[no-untyped-def]
        edges = tensors[0]
        near_0 = scalar_to_ssa(edges[head[0], 0], cutlass.Int32)
        far_0 = scalar_to_ssa(edges[head[0], 1], cutlass.Int32)
        near_1 = scalar_to_ssa(edges[head[0], 2], cutlass.Int32)
        far_1 = scalar_to_ssa(edges[head[0], 3], cutlass.Int32)
        distance = row - column
        first = (distance >= near_0) & (distance < far_0)
        return first | ((distance >= near_1) & (distance < far_1))

    return seen
