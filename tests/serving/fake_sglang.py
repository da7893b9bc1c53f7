"""The parts of SGLang 0.5.23 that the back end touches, with SGLang's names, for machines without
it.

`tests/serving/test_sglang_symbols.py` holds them against SGLang itself where it is installed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from enum import IntEnum, auto
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

OURS = ("spattention.serving.sglang_backend", "spattention.serving.sglang_models.families")


class ForwardMode(IntEnum):
    EXTEND = auto()
    DECODE = auto()
    MIXED = auto()
    IDLE = auto()
    TARGET_VERIFY = auto()
    DRAFT_EXTEND_V2 = auto()

    def is_extend(self) -> bool:
        return self in (ForwardMode.EXTEND, ForwardMode.MIXED, ForwardMode.TARGET_VERIFY)

    def is_decode(self) -> bool:
        return self == ForwardMode.DECODE

    def is_idle(self) -> bool:
        return self == ForwardMode.IDLE

    def is_target_verify(self) -> bool:
        return self == ForwardMode.TARGET_VERIFY


@dataclass
class ForwardBatch:
    """One step of the engine."""

    forward_mode: ForwardMode
    batch_size: int
    req_pool_indices: Tensor
    seq_lens: Tensor
    seq_lens_cpu: Tensor
    out_cache_loc: Tensor
    extend_prefix_lens_cpu: list[int] | None = None
    extend_seq_lens_cpu: list[int] | None = None
    out_cache_loc_is_physical: bool = False


class AttentionBackend:
    forward_metadata: Any = None

    def forward(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> Any:
        mode = forward_batch.forward_mode
        if mode.is_idle():
            return q.new_empty(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)
        call = self.forward_decode if mode.is_decode() else self.forward_extend  # type: ignore[attr-defined]
        return call(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache)


@dataclass
class KVWriteLoc:
    loc: Tensor

    @classmethod
    def for_batch(cls, forward_batch: Any) -> KVWriteLoc:
        return cls(forward_batch.out_cache_loc)


class MHATokenToKVPool:
    """Keys and values `[slots, Hkv, D]` of each layer; unused slots hold NaN."""

    kv_cache_layout = "nhd"
    is_quantized_kv_cache = False

    def __init__(
        self, size: int, page_size: int, dtype: torch.dtype, heads: int, head_dim: int, layers: int
    ) -> None:
        self.dtype, self.device = dtype, torch.device("cpu")
        self.head_dim = self.v_head_dim = head_dim
        shape = (layers, size + page_size, heads, head_dim)
        self.k_buffer = torch.full(shape, torch.nan, dtype=dtype)
        self.v_buffer = torch.full(shape, torch.nan, dtype=dtype)

    def get_key_buffer(self, layer_id: int) -> Tensor:
        return self.k_buffer[layer_id]

    def get_value_buffer(self, layer_id: int) -> Tensor:
        return self.v_buffer[layer_id]

    def set_kv_buffer(self, layer: Any, loc_info: Any, cache_k: Tensor, cache_v: Tensor) -> None:
        self.k_buffer[layer.layer_id, loc_info.loc] = cache_k
        self.v_buffer[layer.layer_id, loc_info.loc] = cache_v


class SWAKVPool(MHATokenToKVPool):
    pass


@dataclass
class ReqToTokenPool:
    req_to_token: Tensor


class AttentionType:
    DECODER = "decoder"


class RadixAttention(torch.nn.Module):
    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        scaling: float,
        num_kv_heads: int,
        layer_id: int,
    ) -> None:
        super().__init__()
        self.tp_q_head_num = num_heads
        self.tp_k_head_num = self.tp_v_head_num = num_kv_heads
        self.head_dim = self.qk_head_dim = self.v_head_dim = head_dim
        self.scaling = scaling
        self.layer_id = layer_id
        self.sliding_window_size = -1
        self.attn_type = AttentionType.DECODER
        self.is_cross_attention = self.use_irope = False
        self.logit_cap = 0.0


@dataclass
class Parallel:
    attn_tp_size: int = 1
    attn_tp_rank: int = 0


@dataclass
class Registry:
    """Everything that a plugin tells SGLang."""

    backends: dict[str, Any] = field(default_factory=dict)
    choices: list[str] = field(default_factory=list)
    providers: list[Any] = field(default_factory=list)
    hooks: dict[str, Any] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=dict)
    parallel: Parallel = field(default_factory=Parallel)
    in_use: tuple[str, str] = ("spattention", "spattention")


def install(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Have `import sglang` give these parts for the rest of a test."""
    registry = Registry()

    def register_attention_backend(name: str) -> Any:
        def decorate(create: Any) -> Any:
            registry.backends[name] = create
            return create

        return decorate

    def register_model_override_predicate(predicate: Any) -> Any:
        def decorate(provider: Any) -> Any:
            registry.providers.append((predicate, provider))
            return provider

        return decorate

    class HookType:
        AROUND = "around"

    class HookRegistry:
        @staticmethod
        def register(target: str, hook: Any, hook_type: str) -> None:
            registry.hooks[target] = hook

    class ModelRegistry:
        @staticmethod
        def is_arch_supported(architecture: str) -> bool:
            return architecture in registry.models

        @staticmethod
        def register(package_name: str, strict: bool = False) -> None:
            families = import_module(f"{package_name}.families")
            registry.models |= {entry.__name__: entry for entry in families.EntryClass}

    class Model(torch.nn.Module):
        """A model of SGLang: its attention modules, and what it was asked to load."""

        def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
            super().__init__()
            ranks = registry.parallel.attn_tp_size
            heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
            self.layers = torch.nn.ModuleList()
            for layer in range(config.num_hidden_layers):
                owner = torch.nn.Module()
                owner.attn = RadixAttention(
                    heads // ranks, 16, 0.25, max(1, kv_heads // ranks), layer
                )
                self.layers.append(owner)

        def load_weights(self, weights: Any) -> set[str]:
            return {name for name, _ in weights}

    contents: dict[str, dict[str, Any]] = {
        "sglang": {"__version__": "0.5.23"},
        "sglang.srt": {},
        "sglang.srt.arg_groups": {},
        "sglang.srt.arg_groups.choices": {"add_attention_backend_choices": registry.choices.extend},
        "sglang.srt.arg_groups.model_override_base": {
            "register_model_override_predicate": register_model_override_predicate,
            # What SGLang filled in for the device.
            "resolving_view": lambda args: SimpleNamespace(
                **vars(args) | {"attention_backend": "intel_amx"}
            ),
        },
        "sglang.srt.layers": {},
        "sglang.srt.layers.attention": {},
        "sglang.srt.layers.attention.attention_registry": {
            "ATTENTION_BACKENDS": registry.backends,
            "register_attention_backend": register_attention_backend,
        },
        "sglang.srt.layers.attention.base_attn_backend": {"AttentionBackend": AttentionBackend},
        "sglang.srt.layers.radix_attention": {
            "RadixAttention": RadixAttention,
            "AttentionType": AttentionType,
        },
        "sglang.srt.mem_cache": {},
        "sglang.srt.mem_cache.memory_pool": {
            "KVWriteLoc": KVWriteLoc,
            "MHATokenToKVPool": MHATokenToKVPool,
        },
        "sglang.srt.plugins": {},
        "sglang.srt.plugins.hook_registry": {"HookRegistry": HookRegistry, "HookType": HookType},
        "sglang.srt.runtime_context": {
            "get_parallel": lambda: registry.parallel,
            "attention_backends": lambda: registry.in_use,
        },
        "sglang.srt.models": {},
        "sglang.srt.models.registry": {"ModelRegistry": ModelRegistry},
    }
    for name in ("Llama", "Mistral", "Olmoe", "Qwen3"):
        family = f"{name}ForCausalLM"
        contents[f"sglang.srt.models.{name.lower()}"] = {family: type(family, (Model,), {})}
    for name, attributes in contents.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    for name in OURS:
        # Imported again with these parts, and forgotten after the test.
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        del sys.modules[name]
    return registry
