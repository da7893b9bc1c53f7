"""Options of `generate` that reach the attention function, or that need a cache to do more."""

from __future__ import annotations

import pytest
import torch
import transformers
from saved_model import PROMPT, SPAN, save

import spattention as spa


@pytest.fixture
def opened(tmp_path):
    folder = save(tmp_path)
    spa.hf.register()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("option", ["stop_strings", "token_healing"])
def test_generate_takes_a_tokenizer(option, opened):
    """Stop strings and token healing need `tokenizer=`, which Transformers hands to attention."""
    model, tokenizer = opened
    inputs = tokenizer(PROMPT, return_tensors="pt")
    plain = model.generate(**inputs, max_new_tokens=SPAN, do_sample=False)
    start = inputs["input_ids"].shape[1]
    given = {"stop_strings": [tokenizer.decode(plain[0, start + 9])], "token_healing": True}
    tokenizer.bos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    found = model.generate(
        **inputs,
        max_new_tokens=SPAN,
        do_sample=False,
        tokenizer=tokenizer,
        past_key_values=spa.hf.BandCache(model.config),
        **{option: given[option]},
    )
    if option == "stop_strings":
        assert start < found.shape[1] <= start + 10
        assert torch.equal(found, plain[:, : found.shape[1]])
