"""Models whose bands have a prefix: whole, packed, padded, generating, saved and compiled."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from tiny import EXACT, HEADS, SPAN, STOCK, Masked, P, banded, build, logits, tokens

import spattention as spa
from spattention.hf import cache as cache_module
from spattention.hf import cache_guard

close = torch.testing.assert_close
BandCache = spa.hf.BandCache
LENGTH = 60  # 2.5 spans
FIRST = P.shared_local(HEADS, SPAN, prefix=3)
SECOND = P((((3, 5),), ((0, 3), (5, 9)), (), ((0, 1), (7, 20))), span=SPAN, prefix=6)
PREFIXED = (FIRST, SECOND)
FULL = (FIRST, P((((3, 5),), ((0, 3), (5, 9)), ((2, 4),), ((7, 20),)), span=SPAN, prefix=6))


def cache_of(kind: str, model: Any) -> Any:
    if kind == "band":
        return BandCache(model.config)
    if kind == "dynamic":
        return transformers.DynamicCache(config=model.config)
    return transformers.StaticCache(config=model.config, max_cache_len=LENGTH + 8)


def generated(model: Any, ids: torch.Tensor, cache: Any = None, **options: Any) -> Any:
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "do_sample": False}
    settings |= {"pad_token_id": 0, "use_cache": cache is not None, **options}
    given = {} if cache is None else {"past_key_values": cache}
    return model.generate(ids, **given, **settings).tolist()


@pytest.mark.parametrize("attention", STOCK)
@pytest.mark.parametrize("family", ["llama", "olmoe"])
def test_logits_are_those_of_the_mask(family, attention):
    model = banded(family, FULL)
    ids = tokens(2, LENGTH)
    wanted = Masked(build(family, attention), FULL)(ids).logits
    close(logits(model, ids), wanted, **STOCK[attention])
    bare = banded(family, tuple(P(p.intervals, p.span) for p in FULL))
    assert (logits(model, ids) - logits(bare, ids)).abs().amax(-1)[:, -9:].min() > 1e-3


def test_each_packed_document_has_its_prefix():
    """By `position_ids`, and flattened with FlashAttention's offsets."""
    model = banded("llama", PREFIXED)
    ids = tokens(1, 40)
    parts = ids.split([23, 2, 15], dim=1)  # the second shorter than the prefix
    wanted = torch.cat([logits(model, part) for part in parts], dim=1)
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    close(logits(model, ids, position_ids=positions, use_cache=False), wanted, **EXACT)
    offsets = torch.tensor([0, 23, 25, 40], dtype=torch.int32)
    flat = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    flat |= {"max_length_q": 23, "max_length_k": 23}
    close(logits(model, ids, position_ids=positions, use_cache=False, **flat), wanted, **EXACT)
    cached = logits(model, ids, position_ids=positions, past_key_values=BandCache(model.config))
    close(cached, wanted, **EXACT)


def test_edit_of_first_token_reaches_later_ones():
    model = banded("llama", PREFIXED)
    ids = tokens(1, LENGTH)
    changed = ids.clone()
    changed[0, 1] = (ids[0, 1] + 1) % 60 + 1
    moved = (logits(model, ids) != logits(model, changed)).any(dim=-1)[0]
    assert not moved[:1].any()
    assert moved[1:].all()


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("kind", ["none", "band", "dynamic", "static"])
def test_padded_rows_are_those_alone(kind, holes):
    """The prefix is the first tokens of the row, after its padding and between holes."""
    model = banded("llama", PREFIXED)
    ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :7] = 0
    if holes:
        mask[0, [1, 2, 5, 30]], mask[1, [9, 40, 41]] = 0, 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache = None if kind == "none" else cache_of(kind, model)
    found, at = [], 0
    for size in [LENGTH] if cache is None else [9, 1, 30, *[1] * 20]:
        now = slice(at, at + size)
        keywords: dict[str, Any] = {"past_key_values": cache} if cache else {"use_cache": False}
        keywords |= {"attention_mask": mask[:, : at + size], "position_ids": positions[:, now]}
        found.append(logits(model, ids[:, now], **keywords))
        at += size
    together = torch.cat(found, dim=1)
    for row in range(2):
        real = mask[row].bool()
        alone = logits(model, ids[row : row + 1, real], use_cache=False)
        close(together[row, real], alone[0], **EXACT)


@pytest.mark.parametrize("kind", ["band", "dynamic", "static"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefill_chunk_size": 5},
        {"num_beams": 3},
        {"num_return_sequences": 2, "do_sample": True},
    ],
    ids=["greedy", "chunks", "beams", "sampling"],
)
def test_generation_equals_that_without_a_cache(kind, options):
    model = banded("llama", PREFIXED, sinks=True)
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    results = []
    for cache in (None, cache_of(kind, model)):
        torch.manual_seed(3)
        chosen = {k: v for k, v in options.items() if cache or k != "prefill_chunk_size"}
        results.append(generated(model, ids, cache, attention_mask=mask, **chosen))
    assert results[0] == results[1]


@pytest.mark.parametrize("max_rollback", [0, 3, 32])
def test_drafts_are_taken_back(max_rollback):
    """The prompt is shorter than the prefix, so that drafts fall into it."""
    model = banded("llama", PREFIXED)
    ids = tokens(1, 2).repeat(1, 2)
    cache = BandCache(model.config, max_rollback=max_rollback)
    wanted = generated(model, ids)
    assert generated(model, ids, cache, prompt_lookup_num_tokens=4) == wanted
    helper = banded("llama", PREFIXED, seed=1)
    helper.generation_config.assistant_confidence_threshold = 0.0
    cache = BandCache(model.config, max_rollback=max_rollback)
    assert generated(model, ids, cache, assistant_model=helper) == wanted


def test_memory_is_rings_and_prefix():
    model = banded("llama", PREFIXED)
    cache = BandCache(model.config)
    logits(model, tokens(1, 4), past_key_values=cache)
    slots = [sum(spa.cache_layout.ring_lengths(p, 2)) + 2 * p.prefix + 1 for p in PREFIXED]
    assert cache.nbytes == sum(slots) * 2 * 8 * 8


def test_saved_models_come_back_with_their_prefix(tmp_path):
    model = banded("llama", PREFIXED, sinks=True)
    model.save_pretrained(tmp_path)
    section = json.loads((tmp_path / "config.json").read_text())["spattention"]
    assert section["version"] == 1
    assert [entry["version"] for entry in section["patterns"]] == [2, 2]
    assert [entry["prefix"] for entry in section["patterns"]] == [3, 6]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    ids = tokens(1, LENGTH)
    close(logits(loaded, ids), logits(model, ids), **EXACT)


def test_a_cache_of_another_prefix_is_refused():
    model = banded("llama", PREFIXED)
    bare = banded("llama", tuple(P(p.intervals, p.span) for p in PREFIXED))
    with pytest.raises(ValueError, match=r"made for this layer's pattern, .*prefix=3"):
        logits(model, tokens(1, 9), past_key_values=BandCache(bare.config))


def test_models_and_decoding_are_one_graph():
    torch._dynamo.reset()
    model = banded("llama", PREFIXED).float()
    ids = tokens(2, 30)
    wanted = logits(model, ids, use_cache=False)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(logits(compiled, ids, use_cache=False), wanted, rtol=0.0, atol=1e-4)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    padded = logits(model, ids, attention_mask=mask, use_cache=False)
    found = logits(compiled, ids, attention_mask=mask, use_cache=False)
    close(found[mask.bool()], padded[mask.bool()], rtol=0.0, atol=1e-4)
    for kind in ("band", "static"):
        cache = cache_of(kind, model)
        logits(model, ids[:, :20], past_key_values=cache)
        for at in range(20, 30):
            now = logits(compiled, ids[:, at : at + 1], past_key_values=cache)
            close(now[:, 0], wanted[:, at], rtol=0.0, atol=1e-4)


def test_every_parameter_has_the_gradient_of_the_mask():
    model, stock = banded("llama", FULL), build("llama", "sdpa")
    ids = tokens(2, 40)
    masked = Masked(stock, FULL)
    model(ids, labels=ids).loss.backward()
    masked(ids, labels=ids).loss.backward()
    for (name, one), other in zip(model.named_parameters(), masked.model.parameters()):
        close(one.grad, other.grad, rtol=0.0, atol=1e-10, msg=name)


def test_a_text_without_restarts_is_one_document(monkeypatch):
    """No start for each query, in the kernels or the store: each layer would look them up."""
    model, ids = banded("llama", FULL), tokens(2, LENGTH)
    cache = BandCache(model.config)
    asked = []
    attend = cache_module.band_attention_cached
    monkeypatch.setattr(
        cache_module,
        "band_attention_cached",
        lambda *given, **more: (asked.append(more["key_start"]), attend(*given, **more))[1],
    )
    wanted = logits(model, ids)
    found = [logits(model, part, past_key_values=cache) for part in ids.split([40, 1, 18, 1], 1)]
    close(torch.cat(found, dim=1), wanted, **EXACT)
    assert asked == [None] * len(asked)
    assert all(layer.store.one_document for layer in cache.layers)


def test_positions_are_read_once_in_a_pass(monkeypatch):
    """By the first layer; the next pass reads them again, though they are in the same tensor."""
    model, ids = banded("llama", PREFIXED), tokens(1, 12)
    read = []
    split = cache_guard.add_restarts
    monkeypatch.setattr(
        cache_guard, "add_restarts", lambda *given: (read.append(1), split(*given))[1]
    )
    positions, cache = torch.arange(12)[None], BandCache(model.config)
    whole = logits(model, ids, position_ids=positions, past_key_values=cache)
    assert len(read) == 1
    cache.reset()
    positions[:, 7:] -= 7
    packed = logits(model, ids, position_ids=positions, past_key_values=cache)
    assert len(read) == 2
    close(packed[:, :7], whole[:, :7], **EXACT)
    close(packed[:, 7:], logits(model, ids[:, 7:]), **EXACT)
