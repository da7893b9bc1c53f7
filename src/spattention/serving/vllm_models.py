"""The model classes that vLLM builds for band models: its own, with other attention layers."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.olmoe import OlmoeForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

from ..bands import BandPattern
from ..hf.config import NAME
from .checks import banded, section_for
from .class_streams import ClassStreams
from .head_classes import HeadClass, described, head_classes, rank_pattern, select_heads
from .marks import without_marks
from .vllm_backend import BandAttentionBackend, ClassBands
from .vllm_cache import PrefixWindowSpec


class ClassAttention(Attention):
    """vLLM's layer for one class of heads, with a cache of its own.

    The first class of a layer computes all: `num_heads` and `num_kv_heads` are the layer's.

    Args:
        part: the class.
        kept_tokens: the first tokens that are kept besides.
        keeps_all: vLLM frees no blocks at all.
        keywords: vLLM's.
    """

    def __init__(
        self, *, part: HeadClass, kept_tokens: int, keeps_all: bool, **keywords: Any
    ) -> None:
        super().__init__(attn_backend=BandAttentionBackend, **keywords)
        self.part = part
        self.kept_tokens = kept_tokens
        self.keeps_all = keeps_all

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        common: dict[str, Any] = {
            "block_size": vllm_config.cache_config.block_size,
            "num_kv_heads": len(self.part.kv_heads),
            "head_size": self.head_size,
            "dtype": self.kv_cache_torch_dtype,
        }
        if self.keeps_all:
            return FullAttentionSpec(**common)
        if self.kept_tokens:
            window = self.part.window
            return PrefixWindowSpec(sliding_window=window, prefix=self.kept_tokens, **common)
        return SlidingWindowSpec(sliding_window=self.part.window, **common)


class BandAttention(torch.nn.Module):
    """Attention of one decoder layer, in place of vLLM's `Attention`.

    Args:
        replaced: the layer in whose place it comes.
        pattern: the bands of this rank's query heads.
        classes: this rank's classes of key/value heads.
        prefix: tokens that the cache keeps for good, the longest prefix of all layers.
        sinks: `[H]`, or None.
        streams: those of the classes.
        vllm_config: vLLM's settings.
    """

    query_order: torch.Tensor
    kv_order: torch.Tensor
    undo_order: torch.Tensor

    def __init__(
        self,
        replaced: Attention,
        pattern: BandPattern,
        classes: tuple[HeadClass, ...],
        prefix: int,
        sinks: torch.Tensor | None,
        streams: ClassStreams,
        vllm_config: VllmConfig,
    ) -> None:
        super().__init__()
        self.num_heads = replaced.num_heads
        self.num_kv_heads = replaced.num_kv_heads
        self.head_size = replaced.head_size
        group = self.num_heads // self.num_kv_heads
        # Classes of neighbouring heads then need no other order of heads. All ranks have to give
        # the same window to a name.
        named = sorted(
            ((part, f"{replaced.layer_name}.class_{index}") for index, part in enumerate(classes)),
            key=lambda entry: entry[0].kv_heads,
        )
        classes, names = zip(*named)
        # vLLM asks every attention layer in this table for its cache.
        table = vllm_config.compilation_config.static_forward_context
        del table[replaced.layer_name]
        query_heads = [
            [head * group + i for head in part.kv_heads for i in range(group)] for part in classes
        ]
        query_order = torch.tensor([head for heads in query_heads for head in heads])
        self.in_order = bool(query_order.equal(torch.arange(self.num_heads)))
        kv_order = torch.tensor([head for part in classes for head in part.kv_heads])
        self.register_buffer("query_order", query_order, persistent=False)
        self.register_buffer("kv_order", kv_order, persistent=False)
        self.register_buffer("undo_order", query_order.argsort(), persistent=False)
        order = tuple(sorted(range(len(classes)), key=lambda index: -classes[index].window))
        firsts = [0, *accumulate(len(heads) for heads in query_heads)]
        self.classes = torch.nn.ModuleList(
            ClassAttention(
                part=part,
                kept_tokens=prefix,
                # vLLM's one window for all layers has no place for a prefix.
                keeps_all=prefix > 0 and not is_hybrid(vllm_config),
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_size=self.head_size,
                scale=replaced.impl.scale,
                cache_config=vllm_config.cache_config,
                quant_config=replaced.quant_config,
                prefix=name,
                bands=ClassBands(
                    select_heads(pattern, heads), sinks, heads, first, names, order, streams
                ),
            )
            for part, heads, first, name in zip(classes, query_heads, firsts, names)
        )

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Args are `[T, heads * D]`, as in vLLM's `Attention`."""
        if self.in_order:
            return self.classes[0](query, key, value)
        query = query.unflatten(-1, (self.num_heads, self.head_size))
        key = key.unflatten(-1, (self.num_kv_heads, self.head_size))
        value = value.unflatten(-1, (self.num_kv_heads, self.head_size))
        query = query.index_select(1, self.query_order)
        key = key.index_select(1, self.kv_order)
        value = value.index_select(1, self.kv_order)
        out = self.classes[0](query.flatten(1), key.flatten(1), value.flatten(1))
        out = out.unflatten(-1, (self.num_heads, self.head_size))
        return out.index_select(1, self.undo_order).flatten(1)


def give_bands(model: torch.nn.Module, vllm_config: VllmConfig) -> None:
    """Replace the attention of every layer that has a pattern."""
    config = vllm_config.model_config.hf_text_config
    section = section_for(config)
    patterns = banded(section)
    ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    classes = head_classes(
        list(patterns.values()),
        config.num_key_value_heads,
        ranks=ranks,
        rank=rank,
        uniform_pages=len(patterns) < config.num_hidden_layers,
        **({} if is_hybrid(vllm_config) else {"max_classes": 1}),
    )
    if rank == 0:
        line = described(list(patterns.values()), classes[0], config.num_hidden_layers)
        init_logger(f"vllm.{NAME}").info("%s", line)  # vLLM shows the loggers below its own
    by_layer = dict(zip(patterns, classes))
    # One number for all layers: vLLM shares a table of blocks among layers of equal specs.
    prefix = max(pattern.prefix for pattern in patterns.values())
    streams = ClassStreams(len(classes[0]), vllm_config.device_config.device)
    owners: list[tuple[Any, Attention]] = [
        (module, module.attn)
        for module in model.modules()
        if isinstance(getattr(module, "attn", None), Attention)
    ]
    assert owners, "vLLM's model has no attention layers of the expected form"
    for owner, attention in owners:
        layer = extract_layer_index(attention.layer_name)
        if layer not in patterns:
            continue
        pattern = rank_pattern(patterns[layer], ranks, rank)
        sinks = _sinks(pattern.num_heads) if section.sinks else None
        if sinks is not None:
            owner.sinks = sinks
        owner.attn = BandAttention(
            attention, pattern, by_layer[layer], prefix, sinks, streams, vllm_config
        )


def is_hybrid(vllm_config: VllmConfig) -> bool:
    """True where vLLM frees the blocks of each class of heads by its window."""
    return not vllm_config.scheduler_config.disable_hybrid_kv_cache_manager


def _sinks(num_heads: int) -> torch.nn.Parameter:
    """The parameter of a layer's sinks, into which vLLM loads this rank's part."""
    sinks: Any = torch.nn.Parameter(torch.empty(num_heads), requires_grad=False)
    sinks.weight_loader = load_sinks
    return sinks


def load_sinks(parameter: torch.nn.Parameter, loaded: torch.Tensor) -> None:
    """Copy this rank's part of a layer's sinks."""
    here = parameter.shape[0]
    rank = get_tensor_model_parallel_rank()
    parameter.data.copy_(loaded[rank * here : (rank + 1) * here])


class Banded:
    """Mixed into a model class of vLLM: its attention layers get their bands."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        give_bands(self, vllm_config)  # type: ignore[arg-type]
        self._section = section_for(vllm_config.model_config.hf_text_config)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """Load weights; their marks must be those of the config's bands."""
        return super().load_weights(without_marks(weights, self._section))  # type: ignore[misc]


class SpattentionLlamaForCausalLM(Banded, LlamaForCausalLM):
    pass


class SpattentionMistralForCausalLM(Banded, MistralForCausalLM):
    pass


class SpattentionQwen3ForCausalLM(Banded, Qwen3ForCausalLM):
    pass


class SpattentionOlmoeForCausalLM(Banded, OlmoeForCausalLM):
    pass


class _TransformersModel(TransformersForCausalLM):
    """vLLM's model of Transformers' modules, whose attention is vLLM's own.

    Once `spattention.hf.register` was called in a process, such modules are refused for a config
    with bands: it is put aside while they are built.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_text_config
        section = config.__dict__.pop(NAME)
        try:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        finally:
            config.spattention = section


class SpattentionOlmo3ForCausalLM(Banded, _TransformersModel):
    """vLLM runs OLMo 3 by Transformers' modules."""
