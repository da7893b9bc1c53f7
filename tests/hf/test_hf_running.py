"""`spa.hf.patterns` tells which bands a model runs, whatever was done to it before."""

from __future__ import annotations

import pytest
import torch
import transformers
from adapted import CONFIGS, PATTERNS, banded, base, dense, folder_of, peft, saved
from tiny import FIRST, HEADS, build

import spattention as spa
from spattention import baselines

__all__ = ["base", "saved"]  # fixtures


def test_patterns_follow_adapters_through_every_way(base, saved, tmp_path):
    """Made, opened, merged, unloaded, saved and opened again."""
    assert spa.hf.patterns(dense(base)) == [None, None]
    assert spa.hf.patterns(banded(base)) == PATTERNS
    folder = folder_of(saved, "lora")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    assert spa.hf.patterns(model) == PATTERNS
    merged = model.merge_and_unload()
    assert spa.hf.patterns(merged) == PATTERNS
    merged.save_pretrained(tmp_path)
    assert spa.hf.patterns(dense(tmp_path)) == PATTERNS
    late = peft.get_peft_model(dense(base), CONFIGS["lora"]())
    assert spa.hf.patterns(spa.hf.apply(late, [None, FIRST])) == [None, FIRST]


def test_patterns_are_those_that_run(base):
    """A model that was set to dense attention in its process runs no bands, whatever its config."""
    model = banded(base)
    model.set_attn_implementation("sdpa")
    assert model.config.spattention is not None
    assert spa.hf.patterns(model) == [None, None]
    model.set_attn_implementation("spattention")
    assert spa.hf.patterns(model) == PATTERNS
    assert spa.hf.patterns(spa.hf.deal(spa.hf.apply(build("llama"), FIRST), 2)) == [FIRST, FIRST]
    other = baselines.apply(build("llama"), baselines.BigBird(HEADS, 64))
    assert spa.hf.patterns(other) == [None, None]


def test_patterns_of_no_decoder_are_refused():
    with pytest.raises(ValueError, match="`model` must be a Transformers model, got Linear"):
        spa.hf.patterns(torch.nn.Linear(2, 2))
    t5 = transformers.T5Config(d_model=8, num_layers=1, num_heads=2, d_kv=4, d_ff=8, vocab_size=9)
    with pytest.raises(ValueError, match="decoder alone"):
        spa.hf.patterns(transformers.T5ForConditionalGeneration(t5))
