"""FlexAttention on the masks of patterns: bands, a prefix, sinks and packed documents."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..bands import BandPattern
from .attend import Attend, Tensors

BLOCK = 128  # queries and keys of a block of the mask


def block_mask(
    pattern: BandPattern,
    length: int,
    device: torch.device,
    offsets: Tensor | None = None,
    queries: int | None = None,
) -> Any:
    """FlexAttention's, over blocks of 128.

    Args:
        pattern: the bands, and a prefix for tokens without documents.
        length: number of keys.
        device: of the mask.
        offsets: as in `Competitor.on`.
        queries: number of queries, the last positions; default all.
    """
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

    seen = mask_function(pattern, length, device, offsets)
    rows = length if queries is None else queries
    if queries is not None:
        seen = _of_last(seen, length - queries)
    if offsets is None and length % BLOCK == 0:
        numbers, indices, whole, whole_indices = band_blocks(pattern, length, rows, device)
        lengths = rows, length
        return BlockMask.from_kv_blocks(
            numbers, indices, whole, whole_indices, BLOCK, seen, seq_lengths=lengths
        )
    compiled = device.type == "cuda"
    heads = pattern.num_heads
    return create_block_mask(seen, None, heads, rows, length, str(device), _compile=compiled)


def band_blocks(pattern: BandPattern, length: int, queries: int, device: torch.device) -> Tensors:
    """Numbers and indices of the blocks of keys that each block of queries sees in part, then of
    those that all of its queries see: int32 `[1, H, blocks]` and `[1, H, blocks, blocks]`. To find
    them in the mask itself takes minutes to compile for some lengths. A block of the prefix counts
    as seen in part.

    Args:
        pattern: the bands and a prefix.
        length: number of keys, a multiple of `BLOCK`.
        queries: number of queries, the last positions.
        device: of the result.
    """
    key = BLOCK * torch.arange(length // BLOCK, device=device)
    first = length - queries + BLOCK * torch.arange(-(-queries // BLOCK), device=device)[:, None]
    last = (first + BLOCK - 1).clamp(max=length - 1)
    low, high = first - key - (BLOCK - 1), last - key  # distances of the block
    near_0, far_0, near_1, far_1 = edges_of(pattern, device)[:, :, None, None].unbind(1)
    in_part = ((key < pattern.prefix) & (high >= 0)).repeat(pattern.num_heads, 1, 1)
    whole = torch.zeros_like(in_part)
    for near, far in ((near_0, far_0), (near_1, far_1)):
        in_part |= (near < far) & (near <= high) & (far > low.clamp(min=0))
        whole |= (near <= low) & (far > high) & (last - first == BLOCK - 1)
    found = []
    for blocks in (in_part & ~whole, whole):
        order = blocks.int().argsort(dim=-1, descending=True, stable=True)
        found += [blocks.sum(-1).int()[None], order.int()[None].contiguous()]
    return tuple(found)


def _of_last(seen: Callable[..., Tensor], first: int) -> Callable[..., Tensor]:
    """The mask of queries whose first has this position."""

    def shifted(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return seen(batch, head, row + first, column)

    return shifted


def mask_function(
    pattern: BandPattern, length: int, device: torch.device, offsets: Tensor | None = None
) -> Callable[..., Tensor]:
    """FlexAttention's `mask_mod` of a pattern: true where `row` sees `column`. Bands and documents
    are tensors, so that patterns share compiled code.
    """
    edges = edges_of(pattern, device)
    near_0, far_0, near_1, far_1 = (edge.contiguous() for edge in edges.unbind(1))

    def in_bands(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        distance = row - column
        first = (distance >= near_0[head]) & (distance < far_0[head])
        return first | ((distance >= near_1[head]) & (distance < far_1[head]))

    if offsets is not None:
        document = _documents(pattern, offsets, length)

        def in_document(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
            same = document[row] == document[column]
            return in_bands(batch, head, row, column) & same

        return in_document
    if pattern.prefix:
        prefix = pattern.prefix

        def in_bands_or_prefix(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
            first_keys = (column < prefix) & (column <= row)
            return in_bands(batch, head, row, column) | first_keys

        return in_bands_or_prefix
    return in_bands


def _documents(pattern: BandPattern, offsets: Tensor, length: int) -> Tensor:
    """Number of the document of every token, int32 `[N]`."""
    if pattern.prefix:
        raise NotImplementedError(
            "`pattern` must have no prefix for a competitor's mask of documents, got prefix "
            f"{pattern.prefix}"
        )
    tokens = torch.arange(length, device=offsets.device)
    return torch.searchsorted(offsets[1:].contiguous(), tokens, right=True).int()


def edges_of(pattern: BandPattern, device: torch.device) -> Tensor:
    """Near and far edges of both intervals of every head, int32 `[H, 4]`."""
    if pattern.prefix and not all(pattern.intervals):
        raise NotImplementedError(
            "`pattern` must have an interval in every head for a competitor's mask with a prefix"
        )
    return torch.tensor(pattern.flat, device=device, dtype=torch.int32).view(-1, 4)


class Flex:
    """Compiled FlexAttention for one shape."""

    name = "FlexAttention"
    options: Any = None

    def __init__(self, inputs: Tensors) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        torch.compiler.reset()
        self.take(inputs)
        self.attend = torch.compile(flex_attention, dynamic=False)
        self.attend_with_sinks = torch.compile(_flex_with_sinks, dynamic=False)

    def take(self, inputs: Tensors) -> None:
        """Attend over other inputs, see `Competitor.take`."""
        self.inputs = inputs

    def on(
        self, pattern: BandPattern, sinks: Tensor | None = None, offsets: Tensor | None = None
    ) -> Attend:
        """On the mask of a pattern."""
        query, key, value, _ = self.inputs
        mask = block_mask(pattern, query.shape[2], query.device, offsets)
        grouped = query.shape[1] != key.shape[1]
        options: Any = None if self.options is None else dict(self.options)
        if sinks is not None:
            return Attend(
                lambda: self.attend_with_sinks(query, key, value, sinks, mask, grouped, options),
                self.inputs,
                sinks,
            )
        return Attend(
            lambda: self.attend(
                query, key, value, block_mask=mask, enable_gqa=grouped, kernel_options=options
            ),
            self.inputs,
        )


def _flex_with_sinks(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, mask: Any, grouped: bool, options: Any
) -> Tensor:
    """FlexAttention, scaled by the share of the weights that the sinks leave."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    found: Any = flex_attention(
        query,
        key,
        value,
        block_mask=mask,
        enable_gqa=grouped,
        kernel_options=options,
        return_aux=AuxRequest(lse=True),
    )
    out, auxiliary = found
    scaled: Tensor = out * torch.sigmoid(auxiliary.lse - sinks.float()[:, None])[..., None]
    return scaled.to(out.dtype)


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
