"""Competitors of `bench attention`: dense attention, FlexAttention, FlashAttention-4 and
flash-sparse-attn. Each class takes the inputs of one shape, and raises where it cannot run.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..attention import band_attention, band_attention_varlen
from ..bands import BandPattern
from .attend import Attend, Tensors, longest_document, tokens_first
from .flex import block_mask, edges_of

PATTERNS: dict[str, Callable[[int, int], BandPattern]] = {
    "exclusive": BandPattern.exclusive,
    "shared_local": BandPattern.shared_local,
    "shared_local geometric": lambda heads, span: BandPattern.shared_local(
        heads, span, widths="geometric"
    ),
}


def bands(
    inputs: Tensors,
    pattern: BandPattern,
    sinks: Tensor | None = None,
    offsets: Tensor | None = None,
    *,
    deterministic: bool = True,
) -> Attend:
    """This library's kernels. Arguments as in `Competitor.on`, and `deterministic` as in
    `band_attention`.
    """
    options: dict[str, Any] = {"sinks": sinks, "deterministic": deterministic, "impl": "triton"}
    if offsets is not None:
        return _packed_bands(tokens_first(inputs), pattern, offsets, options)
    query, key, value, _ = inputs

    def attend() -> Tensor:
        out = band_attention(query, key, value, pattern, **options)
        assert isinstance(out, Tensor)
        return out

    return Attend(attend, inputs, sinks)


def _packed_bands(
    inputs: Tensors, pattern: BandPattern, offsets: Tensor, options: dict[str, Any]
) -> Attend:
    query, key, value, _ = inputs
    longest = longest_document(offsets)

    def attend() -> Tensor:
        out = band_attention_varlen(
            query[0],
            key[0],
            value[0],
            pattern,
            offsets,
            offsets,
            longest,
            longest,
            **options,
        )
        assert isinstance(out, Tensor)
        return out[None]

    return Attend(attend, inputs, options["sinks"], tokens_first=True)


def dense(inputs: Tensors) -> dict[str, Attend]:
    """PyTorch's, by back end; cuDNN's is the first."""
    query, key, value, _ = inputs
    grouped = query.shape[1] != key.shape[1]

    def on(backend: SDPBackend) -> Attend:
        def attend() -> Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, is_causal=True, enable_gqa=grouped
                )

        return Attend(attend, inputs)

    return {
        "cuDNN": on(SDPBackend.CUDNN_ATTENTION),
        "FlashAttention": on(SDPBackend.FLASH_ATTENTION),
    }


def dense_packed(inputs: Tensors, offsets: Tensor) -> Attend:
    """PyTorch's causal attention within documents: its FlashAttention-2."""
    from torch.nn.attention import varlen

    call: Callable[..., Any] = varlen.varlen_attn
    known = inspect.signature(call).parameters  # they differ between releases of PyTorch
    options: dict[str, Any] = {"window_size": (-1, 0), "is_causal": True, "enable_gqa": True}
    options = {name: value for name, value in options.items() if name in known}
    query, key, value, _ = inputs = tokens_first(inputs)
    longest = longest_document(offsets)

    def attend() -> Tensor:
        out: Tensor = call(
            query[0], key[0], value[0], offsets, offsets, longest, longest, **options
        )
        return out[None]

    return Attend(attend, inputs, tokens_first=True)


class Flash4:
    """FlashAttention-4 in its own layout `[B, N, H, D]`; its backward adds in any order."""

    name = "FlashAttention-4"
    package = "flash-attn-4"

    def __init__(self, inputs: Tensors) -> None:
        importlib.import_module("flash_attn.cute")
        self.take(inputs)

    def take(self, inputs: Tensors) -> None:
        """Attend over other inputs, see `Competitor.take`."""
        self.inputs = tokens_first(inputs)

    @property
    def dense(self) -> Attend:
        """With its causal mask."""
        return self._attend(causal=True)

    def on(
        self, pattern: BandPattern, sinks: Tensor | None = None, offsets: Tensor | None = None
    ) -> Attend:
        """On the mask of a pattern: blocks that no query needs are left out."""
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        if pattern.prefix or offsets is not None:
            raise NotImplementedError("its mask is written for bands alone here")
        device = self.inputs[0].device
        mask = block_mask(pattern, self.inputs[0].shape[1], device)
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
            sinks,
            mask_mod=_seen(),
            aux_tensors=[edges_of(pattern, device)],
            block_sparse_tensors=by_query,
            block_sparse_tensors_bwd=by_key,
        )

    def _attend(self, sinks: Tensor | None = None, **options: Any) -> Attend:
        from flash_attn.cute import flash_attn_func

        query, key, value, _ = self.inputs
        return Attend(
            lambda: flash_attn_func(query, key, value, learnable_sink=sinks, **options)[0],
            self.inputs,
            sinks,
            tokens_first=True,
        )


class FlashSparse:
    """flash-sparse-attn in its own layout `[B, N, H, D]`, with its deterministic backward."""

    name = "flash-sparse-attn"
    package = "flash-sparse-attn"

    def __init__(self, inputs: Tensors) -> None:
        self.module = import_below("flash_sparse_attn", "ops.cute")
        self.take(inputs)

    def take(self, inputs: Tensors) -> None:
        """Attend over other inputs, see `Competitor.take`."""
        self.inputs = tokens_first(inputs)

    def on(
        self, pattern: BandPattern, sinks: Tensor | None = None, offsets: Tensor | None = None
    ) -> Attend:
        """On the mask of a pattern; ValueError for one that its windows cannot express."""
        query, key, value, _ = self.inputs
        sizes = window_sizes(pattern, key.shape[2])
        options: dict[str, Any] = {
            "window_sizes": torch.tensor(sizes, device=query.device, dtype=torch.int32),
            "is_local": True,
            "deterministic": True,
            "learnable_sink": sinks,
        }
        call = self.module.flash_attn_func
        if offsets is not None:
            query, key, value = query[0], key[0], value[0]
            longest = longest_document(offsets)
            options |= {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
            options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
            call = self.module.flash_attn_varlen_func

        def attend() -> Tensor:
            out = call(query, key, value, **options)
            out = out[0] if isinstance(out, tuple) else out
            return out if offsets is None else out[None]

        return Attend(attend, self.inputs, sinks, tokens_first=True)


def window_sizes(
    pattern: BandPattern, key_heads: int | None = None
) -> list[tuple[int, int, int, int]]:
    """`(sink, left, right, near)` of each key/value head, as flash-sparse-attn defines them: a
    query sees the distances `[0, near)` and `[near + right, near + right + left)`, and the first
    `sink` keys.

    Args:
        pattern: equal bands in the query heads of a key/value head; ValueError otherwise.
        key_heads: number of key/value heads; default one per query head.
    """
    group = pattern.num_heads // (key_heads or pattern.num_heads)
    found = []
    for head, intervals in enumerate(pattern.intervals):
        if intervals != pattern.intervals[head - head % group]:
            raise ValueError(
                f"`pattern` must have equal bands in each group of {group} heads, got {intervals} "
                f"in head {head}"
            )
        if head % group:
            continue
        near = intervals[0][1] if intervals and intervals[0][0] == 0 else 0
        rest = intervals[1:] if near else intervals
        if len(rest) > 1:
            raise ValueError(f"windows must start with distance 0, got {intervals} in head {head}")
        first, last = rest[0] if rest else (near, near)
        found.append((pattern.prefix, last - first, first - near, near))
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
