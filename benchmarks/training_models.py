"""Models that `benchmarks.training` trains, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from spattention.models import SHAPES, build, preset

# As their config.json on the hub.
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
}
QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "tie_word_embeddings": True,
}
# Without special tokens: those of the configs' defaults may be no entry of a smaller vocabulary.
TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
NAMES = (*SHAPES, "llama-3.2-1b", "qwen3-4b")


def random_model(
    name: str, length: int, layers: int | None, vocabulary: int | None, device: torch.device
) -> Any:
    """A float32 model of one of `NAMES`, with stock attention.

    Args:
        name: its shape.
        length: context, in tokens.
        layers: decoder layers; None for the shape's own.
        vocabulary: entries of the embedding; None for the shape's own.
        device: where the weights are made.
    """
    if name in SHAPES:
        chosen = preset(name, context=length, num_layers=layers, vocab_size=vocabulary)
        with device:
            return build(chosen, pattern=None)
    changes = {"num_hidden_layers": layers, "vocab_size": vocabulary}
    given = {key: value for key, value in changes.items() if value is not None}
    config: PreTrainedConfig
    if name == "llama-3.2-1b":
        config = LlamaConfig(**LLAMA_1B | TOKENS | given, max_position_embeddings=131072)
    elif name == "qwen3-4b":
        config = Qwen3Config(**QWEN3_4B | TOKENS | given, max_position_embeddings=40960)
    else:
        raise ValueError(f"`name` must be one of {NAMES}, got {name!r}")
    with device:
        return AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=torch.float32
        )
