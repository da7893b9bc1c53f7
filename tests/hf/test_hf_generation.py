"""Caches, generation and packing: one set of logits, however the tokens arrive."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from tiny import EXACT, FAMILIES, FIRST, HEADS, SECOND, Calls, Masked, banded, build, logits, tokens

import spattention as spa

close = torch.testing.assert_close


def packed_positions(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def flat_keywords(*lengths: int) -> dict[str, object]:
    offsets = torch.tensor([0, *lengths]).cumsum(dim=0).int()
    return {
        "position_ids": packed_positions(*lengths),
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def static_cache(model, length):
    return transformers.StaticCache(config=model.config, max_cache_len=length)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_packed_and_plain_logits_are_equal(family, monkeypatch):
    model = banded(family, sinks=True)
    calls = Calls(monkeypatch)
    ids = tokens(2, 17)
    plain = logits(model, ids, use_cache=False)

    for cache in (transformers.DynamicCache(config=model.config), static_cache(model, 30)):
        pieces = [ids[:, :9], ids[:, 9:10], ids[:, 10:14], ids[:, 14:]]
        found = [logits(model, piece, past_key_values=cache) for piece in pieces]
        close(torch.cat(found, dim=1), plain, **EXACT)

    lengths = (17, 6, 1, 11)
    documents = [*ids[:1], *(tokens(1, n, seed=n)[0] for n in lengths[1:])]
    wanted = torch.cat([logits(model, d[None]) for d in documents], dim=1)
    row = torch.cat(documents)[None]
    positions = packed_positions(*lengths)
    for use_cache in (False, True):
        found = logits(model, row, position_ids=positions, use_cache=use_cache)
        close(found, wanted, **EXACT)
        found = logits(model, row, use_cache=use_cache, **flat_keywords(*lengths))
        close(found, wanted, **EXACT)
    found = logits(model, row, position_ids=positions, past_key_values=static_cache(model, 40))
    close(found, wanted, **EXACT)
    assert set(calls.patterns) == {FIRST, SECOND}


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_may_be_packed_in_different_places(family):
    model = banded(family)
    ids = tokens(2, 12)
    positions = torch.cat([packed_positions(5, 7), packed_positions(2, 1, 9)])
    wanted = [
        torch.cat([logits(model, part[None]) for part in row.split(lengths)], dim=1)
        for row, lengths in zip(ids, [[5, 7], [2, 1, 9]])
    ]
    for use_cache in (False, True):
        found = logits(model, ids, position_ids=positions, use_cache=use_cache)
        close(found, torch.cat(wanted), **EXACT)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_position_ids_split_no_row_with_a_mask(family, side):
    """Whatever the mask holds and whatever keeps the keys; as in Transformers."""
    stock = Masked(build(family), (FIRST, SECOND))
    model = banded(family)
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    if side != "none":
        mask[1, {"left": slice(0, 3), "right": slice(9, 12)}[side]] = 0
    positions = packed_positions(7, 5)
    # Padding and bands together, for stock attention: one 4-D mask per layer.
    wanted = stock(ids, padding=mask, position_ids=positions, use_cache=False).logits
    caches = [
        None,
        transformers.DynamicCache(config=model.config),
        static_cache(model, 20),
        spa.hf.BandCache(model.config),
    ]
    for cache in caches:
        keywords = {"past_key_values": cache, "use_cache": cache is not None}
        found = logits(model, ids, attention_mask=mask, position_ids=positions, **keywords)
        close(found[mask.bool()], wanted[mask.bool()], **EXACT)
    apart = logits(model, ids, position_ids=positions, use_cache=False)
    assert (apart[0] - wanted[0]).abs().max() > 1e-3


def test_packed_gradients_equal_separate_ones():
    """Packed rows have the gradients of separate documents."""
    lengths = (7, 5)
    ids = tokens(1, 12)
    packed, flat, separate = banded("llama"), banded("llama"), banded("llama")
    positions = packed_positions(*lengths)
    packed(ids, position_ids=positions).logits.square().sum().backward()
    flat(ids, use_cache=False, **flat_keywords(*lengths)).logits.square().sum().backward()
    for part in ids.split(lengths, dim=1):
        separate(part).logits.square().sum().backward()
    wanted = dict(separate.named_parameters())
    for model in (packed, flat):
        for name, parameter in model.named_parameters():
            close(parameter.grad, wanted[name].grad, rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_every_cache_is_the_same(family):
    """Beyond the span too: the bands belong to the pattern, not to the length at hand."""
    model = banded(family, sinks=True)
    ids = tokens(2, 18)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, use_cache=False, **settings)
    assert plain.shape == (2, 25)
    assert model.generate(ids, **settings).tolist() == plain.tolist()
    static = model.generate(ids, cache_implementation="static", **settings)
    assert static.tolist() == plain.tolist()
    alone = model.generate(ids[1:, 7:], max_new_tokens=7, do_sample=False, pad_token_id=0)
    assert alone[0, -7:].tolist() == plain[1, -7:].tolist()


@pytest.mark.parametrize("padding", [4, 5, 6, 11])
@pytest.mark.parametrize("cache", [None, "static"])
def test_prompt_in_chunks_of_padding_alone(padding, cache):
    """The positions 1, 1, 1, ... that Transformers gives to padding are no documents."""
    model = banded("llama", sinks=True)
    ids = tokens(2, 18)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, **settings)
    settings |= {"prefill_chunk_size": 5, "cache_implementation": cache, "disable_compile": True}
    assert model.generate(ids, **settings).tolist() == wanted.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_beam_search_with_and_without_a_cache(family):
    """Beam search with and without a cache is the same."""
    model = banded(family)
    ids = tokens(2, 10)
    settings = {
        "attention_mask": torch.ones_like(ids),
        "num_beams": 2,
        "max_new_tokens": 3,
        "do_sample": False,
        "pad_token_id": 0,
    }
    plain = model.generate(ids, use_cache=False, **settings)
    assert model.generate(ids, **settings).tolist() == plain.tolist()
    static = model.generate(ids, cache_implementation="static", **settings)
    assert static.tolist() == plain.tolist()


def test_unfilled_static_cache_is_never_read():
    """The unfilled end of a static cache is never read."""
    model = banded("llama")
    ids = tokens(1, 9)
    cache = static_cache(model, 20)
    first = logits(model, ids[:, :6], past_key_values=cache)
    for layer in cache.layers:
        layer.keys[:, :, 6:] = torch.nan
        layer.values[:, :, 6:] = torch.nan
    rest = logits(model, ids[:, 6:], past_key_values=cache)
    close(torch.cat([first, rest], dim=1), logits(model, ids), **EXACT)


def test_a_cache_of_another_pattern_is_refused():
    """A cache filled under another pattern is refused."""
    ids = tokens(1, 9)
    model = banded("llama")
    for cache in (transformers.DynamicCache(config=model.config), static_cache(model, 20)):
        spa.hf.apply(model, (FIRST, SECOND))
        logits(model, ids, past_key_values=cache)
        spa.hf.apply(model, (FIRST, FIRST))
        with pytest.raises(ValueError, match="`past_key_values` must have been filled under this"):
            logits(model, ids, past_key_values=cache)
        if isinstance(cache, transformers.StaticCache):
            cache.reset()  # an emptied cache may be filled anew
            close(logits(model, ids, past_key_values=cache), logits(model, ids), **EXACT)
    stock = build("llama")
    cache = stock(ids).past_key_values
    with pytest.raises(ValueError, match="got keys in layer 0 of which nothing says so"):
        logits(model, ids, past_key_values=cache)


def test_a_cache_rebuilt_from_its_tensors():
    """A cache rebuilt from its tensors is vouched for."""
    model, ids = banded("llama"), tokens(2, 20)
    cache = transformers.DynamicCache(config=model.config)
    logits(model, ids[:, :12], past_key_values=cache)
    rebuilt = transformers.DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
    with pytest.raises(
        ValueError, match=r"put into a new cache.* call `spattention\.hf\.trust_cache"
    ):
        logits(model, ids[:, 12:], past_key_values=rebuilt)
    spa.hf.trust_cache(rebuilt, model)
    found = logits(model, ids[:, 12:], past_key_values=rebuilt)
    close(found, logits(model, ids, use_cache=False)[:, 12:], **EXACT)
    for cache, owner, message in (
        (spa.hf.BandCache(model.config), model, "keeps every key, got BandCache"),
        ([], model, "keeps every key, got list"),
        (rebuilt, build("llama"), "must have bands .* got LlamaForCausalLM without"),
        (rebuilt, None, "must have bands .* got NoneType without"),
    ):
        with pytest.raises(ValueError, match=message):
            spa.hf.trust_cache(cache, owner)


@pytest.mark.parametrize("cache", ["none", "dynamic", "static", "band"])
def test_positions_that_jump_forward_are_refused(cache):
    """A shard of a longer text, or skip-wise positions: no documents, though Transformers takes
    them for such."""
    model, ids = banded("llama"), tokens(2, 12)
    made = {
        "none": {"use_cache": False},
        "dynamic": {},
        "static": {"past_key_values": static_cache(model, 20)},
        "band": {"past_key_values": spa.hf.BandCache(model.config)},
    }[cache]
    skips = torch.cat([torch.arange(5), torch.arange(40, 47)]).expand(2, -1)
    for positions in (skips, torch.cat([packed_positions(12), skips[:1]])):
        row = 0 if positions is skips else 1
        message = f"got 4 then 40 in row {row}: with an `attention_mask` of ones"
        with pytest.raises(ValueError, match=message):
            logits(model, ids, position_ids=positions, **made)
    ones = torch.ones_like(ids)
    found = logits(model, ids, position_ids=skips, attention_mask=ones, **made)
    stock = Masked(build("llama"), (FIRST, SECOND))
    wanted = stock(ids, position_ids=skips, attention_mask=ones, use_cache=False).logits
    close(found, wanted, **EXACT)


def test_packing_under_a_mask_is_warned_of_once():
    """Documents then see one another, as in Transformers."""
    model, ids = banded("llama"), tokens(1, 12)
    packed = {"position_ids": packed_positions(7, 5)}
    ones = torch.ones_like(ids)
    padded = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 0]])
    usual = (padded.cumsum(dim=1) - 1).masked_fill(padded == 0, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model, ids, **packed)
        logits(model, ids, attention_mask=ones)
        logits(model, ids, attention_mask=padded, position_ids=usual)
    with pytest.warns(UserWarning, match="leave the `attention_mask` out") as found:
        [logits(model, ids, attention_mask=ones, **packed) for _ in range(2)]
    assert len(found) == 1


def test_a_cache_of_packed_rows_is_not_continued():
    model = banded("llama")
    ids = tokens(1, 12)
    for cache in (transformers.DynamicCache(config=model.config), static_cache(model, 20)):
        logits(model, ids, position_ids=packed_positions(7, 5), past_key_values=cache)
        with pytest.raises(ValueError, match="must hold one document per row to be continued"):
            logits(model, ids[:, :1], past_key_values=cache)
    cache.reset()  # an emptied cache may be filled anew, and gone on from
    found = [logits(model, part, past_key_values=cache) for part in ids.split([7, 5], dim=1)]
    close(torch.cat(found, dim=1), logits(model, ids), **EXACT)


def test_a_cache_of_flattened_rows_is_not_continued():
    """Their offsets mark it: without `position_ids` nothing else tells the documents apart."""
    model = banded("llama")
    ids = tokens(1, 12)
    for lengths in ((7, 5), (12,)):
        flat = flat_keywords(*lengths)
        del flat["position_ids"]
        cache = transformers.DynamicCache(config=model.config)
        logits(model, ids, past_key_values=cache, **flat)
        if len(lengths) > 1:
            with pytest.raises(ValueError, match="must hold one document per row to be continued"):
                logits(model, ids[:, :1], past_key_values=cache)
        else:
            found = logits(model, ids[:, :1], past_key_values=cache)
            close(found, logits(model, torch.cat([ids, ids[:, :1]], dim=1))[:, -1:], **EXACT)


def test_a_cache_that_forgets_keys_is_refused():
    model = banded("llama")
    cache = transformers.DynamicCache(config=build("mistral", sliding_window=4).config)
    with pytest.raises(
        ValueError, match="must keep every key for spattention, got a sliding window"
    ):
        logits(model, tokens(1, 9), past_key_values=cache)


def test_a_span_shorter_than_the_input_still_holds():
    short = spa.BandPattern.dense(HEADS, 5)
    model = banded("llama", short)
    window = spa.BandPattern.sliding_window(HEADS, 64, 5)
    ids = tokens(1, 20)
    close(logits(model, ids), logits(banded("llama", window), ids), **EXACT)
