"""Small models and the baselines that are tested in them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from spattention.baselines import Baseline, BigBird, Longformer, PublishedMask, Reformer

HEADS, SPAN, LAYERS, VOCABULARY = 4, 48, 3, 61
CHOSEN: dict[str, Baseline] = {
    "longformer": Longformer(HEADS, SPAN, narrow=3, wide=7, dilated_heads=2, global_tokens=2),
    "bigbird": BigBird(HEADS, SPAN, block=4, window=2, global_blocks=1, random=2, seed=5),
    "reformer": Reformer(HEADS, SPAN, rounds=3, chunk=4, buckets=8, seed=1),
    "published_longformer": PublishedMask(HEADS, SPAN, mask="longformer"),
    "published_bigbird": PublishedMask(HEADS, SPAN, mask="bigbird"),
    "published_reformer": PublishedMask(HEADS, SPAN, mask="reformer"),
}
MASKED = [name for name in CHOSEN if name != "reformer"]

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.2,
}


def build(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A model in float64 and evaluation mode, with weights large enough that attention matters."""
    config: Any
    if family == "olmoe":
        more = {"num_key_value_heads": HEADS, "intermediate_size": 16, "num_experts": 4}
        config = transformers.OlmoeConfig(
            **{**COMMON, **more, "num_experts_per_tok": 2, **overrides}
        )
    else:
        kind = transformers.Qwen3Config if family == "qwen3" else transformers.LlamaConfig
        # Grouped keys and values.
        more = {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
        config = kind(**{**COMMON, **more, **overrides})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa", experts_implementation="eager"
    )
    return model.double().eval()


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator)


def inputs(length: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """query `[2, 4, N, 8]`, key and value `[2, 2, N, 8]`, float64."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((2, HEADS, length, 8), (2, 2, length, 8), (2, 2, length, 8))
    query, key, value = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes
    )
    return query, key, value
