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


def test_a_kept_cache_needs_new_tokens(opened):
    """The same prompt again holds nothing new, and Transformers gives the model no tokens."""
    model, _ = opened
    ids = torch.arange(6)[None]
    for make in (lambda: spa.hf.BandCache(model.config), transformers.DynamicCache):
        cache = make()
        model.generate(ids, past_key_values=cache, max_new_tokens=9)
        with pytest.raises(ValueError, match="`input_ids` must hold at least one token that is"):
            model.generate(ids, past_key_values=cache, max_new_tokens=9)


def test_a_cache_says_how_to_change_its_batch(opened):
    model, _ = opened
    ids = torch.arange(6)[None]
    cache = spa.hf.BandCache(model.config)
    model(ids, past_key_values=cache)
    cache.reset()
    with pytest.raises(ValueError, match="make a new cache for another batch, or change this one"):
        model(ids.repeat(2, 1), past_key_values=cache)
    model(torch.zeros(1, 40, dtype=torch.long), past_key_values=cache)
    with pytest.raises(ValueError, match="got 33; make it with a larger `max_rollback`"):
        cache.crop(-33)


def test_a_conversation_keeps_its_cache(opened):
    """Each turn gives all tokens so far, of which only the new ones are computed."""
    model, tokenizer = opened
    cache = spa.hf.BandCache(model.config)
    tokens = torch.zeros(1, 0, dtype=torch.long)
    options = {"max_new_tokens": SPAN, "do_sample": False}
    sizes = set()
    for turn in ("It was dark.", " And then?", " The captain said"):
        tokens = torch.cat([tokens, tokenizer(turn, return_tensors="pt").input_ids], dim=1)
        plain = model.generate(tokens, **options)
        tokens = model.generate(tokens, past_key_values=cache, **options)
        assert torch.equal(tokens, plain)
        assert cache.get_seq_length() == tokens.shape[1] - 1
        sizes.add(cache.nbytes)
    assert tokens.shape[1] > 3 * SPAN
    assert len(sizes) == 1


def test_an_answer_is_taken_back_and_drawn_again(opened):
    model, _ = opened
    cache = spa.hf.BandCache(model.config, max_rollback=2 * SPAN)
    prompt = torch.arange(6)[None]
    options = {"max_new_tokens": 2 * SPAN, "do_sample": False}
    first = model.generate(prompt, past_key_values=cache, **options)
    cache.crop(-2 * SPAN)  # without the prompt's last token, which has to be computed again
    assert torch.equal(first, model.generate(prompt, past_key_values=cache, **options))
