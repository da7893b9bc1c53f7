"""Tiny models of every supported family, and stock attention under the same mask."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers

import spattention as spa
from spattention.hf import attention as hf_attention

P = spa.BandPattern
VOCABULARY = 61
HEADS = 4
SPAN = 24
# Float64 and the same arithmetic up to its order: far below what any wrong key would change.
EXACT = {"rtol": 0.0, "atol": 1e-10}
# Eager attention has a float32 softmax whatever the model's dtype: 1e-7 per weight, through two
# layers.
EAGER = {"rtol": 0.0, "atol": 2e-5}
STOCK = {"sdpa": EXACT, "eager": EAGER}

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": HEADS,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "intermediate_size": 48}
CONFIGS: dict[str, Callable[..., Any]] = {
    "olmoe": lambda **o: transformers.OlmoeConfig(
        **{
            **COMMON,
            "num_key_value_heads": HEADS,
            "intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            **o,
        }
    ),
    "llama": lambda **o: transformers.LlamaConfig(**{**COMMON, **GROUPED, **o}),
    "qwen3": lambda **o: transformers.Qwen3Config(**{**COMMON, **GROUPED, "head_dim": 8, **o}),
    "mistral": lambda **o: transformers.MistralConfig(
        **{**COMMON, **GROUPED, "sliding_window": None, **o}
    ),
    "gpt_neox": lambda **o: transformers.GPTNeoXConfig(
        **{**COMMON, "intermediate_size": 48, "rotary_pct": 0.5, **o}
    ),
}
FAMILIES = tuple(CONFIGS)

# Different in each layer, so that a layer that runs another's pattern is found out.
FIRST = P.shared_local(HEADS, SPAN)
SECOND = P(intervals=(((0, 1),), ((0, 3), (5, 9)), ((0, 2),), ((0, 1), (7, 20))), span=SPAN)


def build(family: str, attention: str = "sdpa", seed: int = 0, **overrides: Any) -> Any:
    """A model in float64 and evaluation mode, with weights large enough that attention matters."""
    torch.manual_seed(seed)
    config = CONFIGS[family](initializer_range=0.2, **overrides)
    # Grouped products of experts know no float64.
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, experts_implementation="eager"
    )
    return model.double().eval()


def banded(family: str, pattern: Any = (FIRST, SECOND), sinks: bool = False, **over: Any) -> Any:
    return spa.hf.apply(build(family, **over), pattern, sinks=sinks)


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator)


def logits(model: Any, ids: torch.Tensor, **keywords: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **keywords).logits


class Masked:
    """Stock eager attention, each layer under `pattern.mask` as a 4-D mask."""

    def __init__(self, model: Any, patterns: Sequence[spa.BandPattern | None]) -> None:
        self.model = copy.deepcopy(model)
        self.patterns = patterns

    def __call__(
        self, ids: torch.Tensor, *, padding: torch.Tensor | None = None, **keywords: Any
    ) -> Any:
        handles = []
        for module in self.model.modules():
            if hasattr(module, "layer_idx") and hasattr(module, "is_causal"):
                pattern = self.patterns[module.layer_idx]
                if pattern is not None:
                    mask = pattern.mask(ids.shape[1])
                    if padding is not None:
                        mask = mask & padding.bool()[:, None, None]
                    hook = self._hook(mask)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            return self.model(ids, **keywords)
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def _hook(mask: torch.Tensor) -> Callable[..., Any]:
        added = torch.zeros(mask.shape, dtype=torch.float64)
        added = added.masked_fill(~mask, torch.finfo(torch.float64).min)
        added = added if added.dim() == 4 else added[None]
        return lambda module, args, keywords: (args, {**keywords, "attention_mask": added})


class Calls:
    """Records (layer index, pattern) of every call of the operators."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patterns: list[spa.BandPattern] = []
        for name in ("band_attention", "band_attention_varlen"):
            monkeypatch.setattr(hf_attention, name, self._recording(getattr(hf_attention, name)))

    def _recording(self, operator: Callable[..., Any]) -> Callable[..., Any]:
        def call(
            query: Any, key: Any, value: Any, pattern: Any, *args: Any, **keywords: Any
        ) -> Any:
            self.patterns.append(pattern)
            return operator(query, key, value, pattern, *args, **keywords)

        return call
