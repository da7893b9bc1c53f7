"""vLLM's attention back end for bands: prefill and decoding over its paged cache.

On CUDA kernels read the block table (`paged.py`). Requests with one new token are decoded inside
CUDA graphs where a step has no others. Only a step that copies keys waits for the device, to
send it the places of the keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)

from ..attention import kernels_for
from ..bands import BandPattern
from .checks import check_cache_dtype, check_group
from .class_streams import ClassStreams
from .paged import (
    Decodes,
    PagedPrefills,
    Prefills,
    Step,
    attend,
    leading_decodes,
    page_kernels,
    prefills_of,
    write,
)


@dataclass
class BandMetadata(AttentionMetadata):
    """The part of one step that all layers of one class of heads share."""

    step: Step


class BandAttentionBackend(AttentionBackend):
    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # the name that vLLM keeps for back ends that are not its own

    @staticmethod
    def get_impl_cls() -> type[BandAttentionImpl]:
        return BandAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[BandMetadataBuilder]:
        return BandMetadataBuilder

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True


class BandMetadataBuilder(AttentionMetadataBuilder[BandMetadata]):
    # Steps with prefill differ in shape, so vLLM captures those around attention.
    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )
    # vLLM moves requests of one new token to the front.
    reorder_batch_threshold: int | None = 1

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        if _has_kernels(kv_cache_spec, vllm_config.device_config.device):
            return cls._cudagraph_support
        return AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        check_group(layer_names)
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.block_size = kv_cache_spec.block_size
        self.window = getattr(kv_cache_spec, "sliding_window", None)
        self.prefix = getattr(kv_cache_spec, "prefix", 0)
        self.has_kernels = _has_kernels(kv_cache_spec, device)
        self.sample = _sample(kv_cache_spec, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> BandMetadata:
        requests = common_attn_metadata.num_reqs
        table, seq_lens = common_attn_metadata.block_table_tensor, common_attn_metadata.seq_lens
        if self.has_kernels and common_attn_metadata.max_query_len == 1:
            # Slices of vLLM's own buffers, which a captured graph reads again. Rows that only pad
            # the batch are of length 0.
            return BandMetadata(Step(Decodes(table[:requests], seq_lens[:requests]), None))
        offsets = common_attn_metadata.query_start_loc_cpu[: requests + 1].tolist()
        decodes = leading_decodes(offsets) if self.has_kernels else 0
        prefills = self._prefills(common_attn_metadata, offsets, decodes)
        by_kernels = Decodes(table[:decodes], seq_lens[:decodes]) if decodes else None
        return BandMetadata(Step(by_kernels, prefills))

    def _prefills(
        self, metadata: CommonAttentionMetadata, offsets: list[int], decodes: int
    ) -> PagedPrefills | Prefills | None:
        """The requests after the first `decodes`, whose new tokens start at `offsets`."""
        rest, first, last = slice(decodes, metadata.num_reqs), offsets[decodes], offsets[-1]
        if first == last:
            return None
        table = metadata.block_table_tensor[rest]
        new_tokens = (last - first) // table.shape[0]
        # Exact on the host, since speculative decoding is refused.
        lengths = metadata.seq_lens_cpu_upper_bound
        assert lengths is not None
        facts = self.block_size, self.window, self.prefix
        copies = functools.cache(
            functools.partial(prefills_of, offsets[decodes:], lengths[rest].tolist(), table, *facts)
        )
        if page_kernels(self.sample, self.sample, self.block_size, new_tokens) is None:
            return copies()
        starts = metadata.query_start_loc[decodes : metadata.num_reqs + 1]
        starts = starts - first if first else starts
        return PagedPrefills(
            first, last, starts, table, metadata.seq_lens[rest], metadata.max_seq_len, copies
        )


def _sample(kv_cache_spec: Any, device: torch.device) -> torch.Tensor:
    """A tensor of the cache's head_dim and dtype."""
    return torch.empty((1, kv_cache_spec.head_size), dtype=kv_cache_spec.dtype, device=device)


def _has_kernels(kv_cache_spec: Any, device: torch.device) -> bool:
    """True where the decoding kernels run with this cache."""
    sample = _sample(kv_cache_spec, device)
    return kernels_for(sample, sample) is not None


@dataclass(frozen=True)
class ClassBands:
    """The bands and sinks of one class of heads in one layer.

    Attributes:
        pattern: the bands of this class's query heads.
        sinks: `[H]` of all the rank's heads, or None.
        query_heads: indices of this class's heads among those of `sinks`.
        first: the first of these heads in the queries that the layer is given.
        layers: vLLM's names of the layer's classes, in the order of their key/value heads.
        order: indices of `layers` in the order of their launches, the farthest window first. The
            others then fill the GPU beside its last programs.
        streams: those of the layer's classes.
    """

    pattern: BandPattern
    sinks: torch.Tensor | None
    query_heads: list[int]
    first: int
    layers: tuple[str, ...]
    order: tuple[int, ...]
    streams: ClassStreams


class BandAttentionImpl(AttentionImpl[BandMetadata]):
    """Attention of one class of heads in one layer; arguments are vLLM's, and `bands`.

    vLLM calls the first class of a layer with the heads of all. It runs the others, whose layers
    only hold their caches.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        *,
        bands: ClassBands,
    ) -> None:
        check_cache_dtype(kv_cache_dtype)
        for name, given in (
            ("alibi_slopes", alibi_slopes),
            ("logits_soft_cap", logits_soft_cap),
            ("kv_sharing_target_layer_name", kv_sharing_target_layer_name),
        ):
            if given is not None:
                raise ValueError(f"`{name}` must be None for spattention, got {given!r}")
        if attn_type != AttentionType.DECODER:
            raise ValueError(f'`attn_type` must be "decoder" for spattention, got {attn_type!r}')
        assert bands.pattern.num_heads <= num_heads
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.bands = bands
        self.sinks: torch.Tensor | None = None  # once weights are loaded

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        if self.bands.sinks is not None:
            self.sinks = self.bands.sinks.detach()[self.bands.query_heads].float()

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: BandMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store the new keys of all classes, and fill `output [T, H, D]` from their caches."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("spattention does not quantize its output")
        if attn_metadata is None:  # vLLM measures memory without a cache
            return output.zero_()
        caches, slots, classes = [], [], list[Callable[[], None]]()
        for name in self.bands.layers:
            metadata, holder, cache, slot_mapping = get_attention_context(name)
            caches.append(cache)
            slots.append(slot_mapping)
            attend_class = holder.impl.attend_class
            classes.append(functools.partial(attend_class, query, cache, metadata.step, output))
        _store(key, value, caches, slots)
        in_place = isinstance(metadata.step.prefills, PagedPrefills)
        self._run([classes[index] for index in self.bands.order], in_place)
        return output

    def _run(self, classes: Sequence[Callable[[], None]], in_place: bool) -> None:
        """Launch the classes: side by side in a captured step, where nothing is launched later than
        the graph says, and where prompts are read, whose launches outlast the host's.
        """
        streams = self.bands.streams
        if streams.sides and (in_place or torch.cuda.is_current_stream_capturing()):
            streams.run(classes)
        else:
            for launch in classes:
                launch()

    def attend_class(
        self, query: torch.Tensor, cache: torch.Tensor, step: Step, output: torch.Tensor
    ) -> None:
        """Fill this class's heads of `output [T, H, D]`."""
        heads = slice(self.bands.first, self.bands.first + self.bands.pattern.num_heads)
        attend(
            query[:, heads],
            cache,
            step,
            self.bands.pattern,
            output[:, heads],
            scale=self.scale,
            sinks=self.sinks,
        )


def _store(
    key: torch.Tensor,
    value: torch.Tensor,
    caches: Sequence[torch.Tensor],
    slots: Sequence[torch.Tensor],
) -> None:
    """Store the new keys and values of all classes. Tokens beyond the slots only pad the batch."""
    if key.is_cuda:
        from .class_store import store  # Triton is not there on every machine

        store(key, value, caches, slots)
        return
    first = 0
    for cache, slot in zip(caches, slots):
        heads, tokens = slice(first, first + cache.shape[1]), slot.shape[0]
        write(key[:tokens, heads], value[:tokens, heads], cache, slot)
        first += cache.shape[1]
