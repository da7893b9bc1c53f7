"""Competitors of `bench attention`: dense attention, FlexAttention, FlashAttention-4 and
flash-sparse-attn. Each class takes the inputs of one shape, and raises where it cannot run.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..attention import band_attention
from ..bands import BandPattern

Tensors = tuple[torch.Tensor, ...]

PATTERNS: dict[str, Callable[[int, int], BandPattern]] = {
    "exclusive": BandPattern.exclusive,
    "shared_local": BandPattern.shared_local,
    "shared_local geometric": lambda heads, span: BandPattern.shared_local(
        heads, span, widths="geometric"
    ),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


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


class Competitor(Protocol):
    """Another implementation of attention on the mask of a pattern, for inputs of one shape."""

    name: str

    def on(self, pattern: BandPattern) -> Attend:
        """The call on the mask of a pattern; whatever it raises is the reason not to time it."""


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
    if pattern.prefix:
        raise NotImplementedError(
            f"`pattern` must have no prefix for a competitor's mask, got prefix {pattern.prefix}"
        )
    return torch.tensor(pattern.flat, device="cuda", dtype=torch.int32).view(-1, 4)


class Flex:
    """Compiled FlexAttention for one shape."""

    name = "FlexAttention"
    options: Any = None

    def __init__(self, inputs: Tensors) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        torch.compiler.reset()
        self.inputs = inputs
        self.attend = torch.compile(flex_attention, dynamic=False)

    def on(self, pattern: BandPattern) -> Attend:
        """On the mask of a pattern."""
        query, key, value, _ = self.inputs
        mask = _block_mask(pattern, query.shape[2])
        options: Any = None if self.options is None else dict(self.options)
        return Attend(
            lambda: self.attend(query, key, value, block_mask=mask, kernel_options=options),
            self.inputs,
        )


class FlexFlash(Flex):
    """FlexAttention on its FLASH back end, the kernels of FlashAttention-4; its backward adds in
    any order.
    """

    name = "FlexAttention FLASH"
    options: Any = MappingProxyType({"BACKEND": "FLASH"})

    def __init__(self, inputs: Tensors) -> None:
        from torch.nn.attention.flex_attention import FlexKernelOptions

        if "BACKEND" not in FlexKernelOptions.__annotations__:  # it would be ignored
            raise ValueError(f"FlexAttention of PyTorch {torch.__version__} has no FLASH back end")
        super().__init__(inputs)


class Flash4:
    """FlashAttention-4 in its own layout `[B, N, H, D]`; its backward adds in any order."""

    name = "FlashAttention-4"
    package = "flash-attn-4"

    def __init__(self, inputs: Tensors) -> None:
        importlib.import_module("flash_attn.cute")
        self.inputs = _tokens_first(inputs)

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


class FlashSparse:
    """flash-sparse-attn in its own layout `[B, N, H, D]`, with its deterministic backward."""

    name = "flash-sparse-attn"
    package = "flash-sparse-attn"

    def __init__(self, inputs: Tensors) -> None:
        module = import_below("flash_sparse_attn", "ops.cute")
        self.attend = module.flash_attn_func
        self.inputs = _tokens_first(inputs)

    def on(self, pattern: BandPattern) -> Attend:
        """On the mask of a pattern; ValueError for one that its windows cannot express."""
        query, key, value, _ = self.inputs
        windows = torch.tensor(window_sizes(pattern), device=query.device, dtype=torch.int32)

        def attend() -> torch.Tensor:
            out = self.attend(
                query, key, value, window_sizes=windows, is_local=True, deterministic=True
            )
            return out[0] if isinstance(out, tuple) else out

        return Attend(attend, self.inputs)


def window_sizes(pattern: BandPattern) -> list[tuple[int, int, int, int]]:
    """`(sink, left, right, near)` of each head, as flash-sparse-attn defines them: a query sees the
    distances `[0, near)` and `[near + right, near + right + left)`.
    """
    found = []
    for head, intervals in enumerate(pattern.intervals):
        near = intervals[0][1] if intervals and intervals[0][0] == 0 else 0
        rest = intervals[1:] if near else intervals
        if len(rest) > 1:
            raise ValueError(f"windows must start with distance 0, got {intervals} in head {head}")
        first, last = rest[0] if rest else (near, near)
        found.append((0, last - first, first - near, near))
    return found


def import_below(package: str, name: str) -> Any:
    """Import a module of a package without running the package's own `__init__`, which may need
    more than the module does. The package stays empty in this process.
    """
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        sys.modules[package] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{package}.{name}")


def package_versions() -> dict[str, str]:
    """Versions of the competitors' packages, those that are installed."""
    found = {}
    for package in (Flash4.package, FlashSparse.package):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # its absence is named where it is asked to run
            continue
    return found


def _tokens_first(inputs: Tensors) -> Tensors:
    """Copies `[B, N, H, D]` of inputs `[B, H, N, D]`, the first three with gradients."""
    moved = [tensor.detach().transpose(1, 2).contiguous() for tensor in inputs]
    return *(tensor.requires_grad_() for tensor in moved[:3]), moved[3]


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
