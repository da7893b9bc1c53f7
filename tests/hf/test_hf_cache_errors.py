"""What a BandCache cannot honour raises a ValueError that names the argument, the rule and the
value, and leaves the cache as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from tiny import EXACT, banded, build, logits, tokens

import spattention as spa

BandCache = spa.hf.BandCache
MAKING = [
    ({"max_rollback": -1}, "`max_rollback` must not be negative, got -1"),
    ({"max_rollback": None}, "`max_rollback` must be an int, got None"),
    ({"max_rollback": 2.0}, r"`max_rollback` must be an int, got 2\.0"),
    ({"slack": -1}, "`slack` must not be negative, got -1"),
    ({"slack": "16"}, "`slack` must be an int, got '16'"),
    ({"slack": 1, "max_rollback": 2}, "`slack` is the former name of `max_rollback`.* got both"),
    ({"capacity": 0}, "`capacity` must be at least 1, got 0"),
    ({"capacity": 1.5}, r"`capacity` must be an int, got 1\.5"),
    ({"capacity": True}, "`capacity` must be an int, got True"),
    ({"capacity": 2**62}, f"`capacity` must be at most {2**31 - 1}, got {2**62}"),
    ({"max_rollback": 2**63}, f"`max_rollback` must be at most {2**31 - 1}, got an integer of"),
    ({"slack": 2**62}, f"`slack` must be at most {2**31 - 1}, got {2**62}"),
]


@pytest.mark.parametrize(("options", "message"), MAKING, ids=str)
def test_a_cache_names_what_it_cannot_be_made_of(options, message):
    with pytest.raises(ValueError, match=message):
        BandCache(banded("llama").config, **options)


def test_a_config_without_bands_is_refused():
    for config, message in (
        (build("llama").config, "`config` must have a section `spattention`"),
        (banded("llama"), "`config` must be a model's config, got Llama"),
        (None, "`config` must be a model's config, got NoneType"),
        ({"spattention": {}}, "`config` must be a model's config, got dict"),
        (transformers.LlamaConfig(spattention=3), "must be a mapping, got int"),
        (transformers.LlamaConfig(spattention={"version": 9}), "must have version 1"),
    ):
        with pytest.raises(ValueError, match=message):
            BandCache(config)


def filled() -> tuple[Any, Any]:
    model = banded("llama")
    cache = BandCache(model.config, max_rollback=4)
    logits(model, tokens(2, 33)[:, :30], past_key_values=cache)
    return model, cache


def check_unchanged(cache: Any, before: Any) -> None:
    for old, new in zip(before.layers, cache.layers):
        torch.testing.assert_close(new.store.keys, old.store.keys)
        torch.testing.assert_close(new.store.counts, old.store.counts)


def test_a_cache_names_what_it_cannot_do():
    _, cache = filled()
    before = copy.deepcopy(cache)
    for method, argument, message in (
        ("crop", 1, "`tokens_to_remove` must be minus the number of tokens, got 1"),
        ("crop", -5, "`tokens` must be at most the store's `max_rollback` = 4, got 5"),
        ("crop", -1.5, r"`tokens_to_remove` must be an int, got -1\.5"),
        ("crop", "-1", "`tokens_to_remove` must be an int, got '-1'"),
        ("crop", None, "`tokens_to_remove` must be an int, got None"),
        ("crop", True, "`tokens_to_remove` must be an int, got True"),
        ("reorder_cache", torch.tensor([0, 2]), "`rows` must be from 0 to 1, got 2"),
        ("reorder_cache", torch.tensor([0]), r"`rows` must be \[B\] = \[2\], got \[1\]"),
        ("batch_select_indices", torch.tensor([[0]]), r"`rows` must be \[rows\], got \[1, 1\]"),
        ("batch_select_indices", [0], "`rows` must be a tensor, got list"),
        ("batch_repeat_interleave", 0, "`times` must be at least 1, got 0"),
        ("crop", -(2**70), f"`tokens` must be at most {2**31 - 1}, got an integer of 72 bits"),
        ("batch_repeat_interleave", 2**62, f"`times` must be at most {2**31 - 1}, got {2**62}"),
        ("batch_repeat_interleave", 2**30, "must fit into the .* GiB of cpu"),
        ("to", "abacus", "`device` must be a device that PyTorch knows, got 'abacus'"),
    ):
        with pytest.raises(ValueError, match=message):
            getattr(cache, method)(argument)
        check_unchanged(cache, before)
    with pytest.raises(ValueError, match="must not be offloaded when it is a BandCache"):
        cache.offload(0)


def test_padding_of_a_cache_does_not_change():
    """A cache does not change its mind about padding."""
    model, cache = filled()
    before = copy.deepcopy(cache)
    ids = tokens(2, 33)
    for row, column in ((0, 0), (1, 29)):
        mask = torch.ones_like(ids)
        mask[row, column] = 0
        message = f"say of earlier tokens .* got 29 tokens in row {row} before these, and 30 in"
        with pytest.raises(ValueError, match=message):
            logits(model, ids[:, 30:], attention_mask=mask, past_key_values=cache)
        check_unchanged(cache, before)
    mask = torch.ones_like(ids)
    found = logits(model, ids[:, 30:], attention_mask=mask, past_key_values=cache)
    wanted = logits(model, ids, use_cache=False)[:, 30:]
    torch.testing.assert_close(found, wanted, **EXACT)


def test_a_cache_in_the_wrong_hands_names_the_cause():
    model, cache = filled()
    before = copy.deepcopy(cache)
    ids = tokens(2, 1)
    short = torch.ones(2, 30, dtype=torch.long)
    with pytest.raises(ValueError, match="must cover all 31 tokens so far"):
        logits(model, ids, attention_mask=short, past_key_values=cache)
    with pytest.raises(ValueError, match="filled with, 2 rows, got 3 in layer 0"):
        logits(model, tokens(3, 1), past_key_values=cache)
    with pytest.raises(ValueError, match=r"must be read by the bands .* got another attention"):
        logits(build("llama"), ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"`key` must have .* got torch\.float32"):
        logits(copy.deepcopy(model).float(), ids, past_key_values=cache)
    check_unchanged(cache, before)


def test_a_cache_without_layers_is_named():
    """Such as that of an encoder-decoder, or another library's."""
    model = banded("llama")
    cache = transformers.EncoderDecoderCache(
        transformers.DynamicCache(), transformers.DynamicCache()
    )
    with pytest.raises(
        ValueError, match=r"must be a cache of a decoder, .* got EncoderDecoderCache"
    ):
        logits(model, tokens(2, 5), past_key_values=cache)


def test_dense_attention_continues_no_keys_of_bands():
    """A model can be made dense between two calls; deeper keys are those of its bands."""
    model, ids = banded("llama"), tokens(2, 5)
    cache = transformers.DynamicCache(config=model.config)
    logits(model, ids, past_key_values=cache)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r'"sdpa", got keys of bands in layer 0'):
        logits(model, ids, past_key_values=cache)
    cache = transformers.DynamicCache(config=model.config)
    logits(model, ids, past_key_values=cache)
    found = logits(model, ids, past_key_values=cache)
    wanted = logits(build("llama"), torch.cat([ids, ids], dim=1))[:, 5:]
    torch.testing.assert_close(found, wanted, **EXACT)
