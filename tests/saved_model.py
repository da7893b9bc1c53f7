"""A small Llama with bands and its tokenizer in a folder, as `save_pretrained` leaves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, logging

import spattention as spa
from spattention.data.tokenizer import for_transformers, train_tokenizer

PROMPT = "It was a dark and stormy night, and the captain said to the crew"
SPAN = 40
PATTERN = spa.BandPattern.exclusive(4, SPAN)
CONTEXT = 600
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def save(folder: Path, sinks: bool = False, bands: bool = True, seed: int = 0) -> Path:
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    tokenizer = train_tokenizer([PROMPT], 270)
    config = LlamaConfig(vocab_size=270, max_position_embeddings=CONTEXT, **SIZES, **HEADS)
    config.initializer_range = 0.3
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    if bands:
        spa.hf.apply(model, PATTERN, sinks=sinks)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    for_transformers(tokenizer, CONTEXT, None).save_pretrained(folder)
    return folder


def edit(file: Path, **changes: Any) -> None:
    """Change entries of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
