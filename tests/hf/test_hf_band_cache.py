"""BandCache in `generate` and out of it: the logits and tokens of a model without a cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from tiny import EXACT, FAMILIES, FIRST, HEADS, SECOND, SPAN, P, banded, build, logits, tokens

import spattention as spa
from spattention.testing import check_error

close = torch.testing.assert_close
BandCache = spa.hf.BandCache
LENGTH = 66  # 2.75 spans
KINDS = ("band", "dynamic", "static")
PATTERNS = {
    "dense": P.dense(HEADS, SPAN),
    "sliding_window": P.sliding_window(HEADS, SPAN, 7),
    "exclusive": P.exclusive(HEADS, SPAN),
    "exclusive_geometric": P.exclusive(HEADS, SPAN, widths="geometric", first=2),
    "exclusive_equal_work": P.exclusive(HEADS, SPAN, widths="equal_work"),
    "shared_local": P.shared_local(HEADS, SPAN),
    "shared_local_geometric": P.shared_local(HEADS, SPAN, widths="geometric", first=2, local=3),
    "gapped": P.gapped(HEADS, SPAN),
    "local_only": P.local_only(HEADS, SPAN),
    "hand_made": SECOND,
    "prefix": P.exclusive(HEADS, SPAN, prefix=3),
    "head_without_keys": P(intervals=((), (), ((0, 3),), ((2, 24),)), span=SPAN),
}


def make_cache(kind: str, model: Any) -> Any:
    if kind == "band":
        return BandCache(model.config)
    if kind == "dynamic":
        return transformers.DynamicCache(config=model.config)
    return transformers.StaticCache(config=model.config, max_cache_len=LENGTH)


def in_pieces(model: Any, ids: torch.Tensor, pieces: Any, cache: Any, **keywords: Any) -> Any:
    found = [
        logits(model, part, past_key_values=cache, **keywords) for part in ids.split(pieces, 1)
    ]
    return torch.cat(found, dim=1)


def generated(model: Any, ids: torch.Tensor, cache: Any = None, **options: Any) -> Any:
    settings = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": LENGTH - ids.shape[1],
        "do_sample": False,
        "pad_token_id": 0,
        **options,
    }
    torch.manual_seed(7)
    if cache is None:
        return model.generate(ids, use_cache=False, **settings).tolist()
    return model.generate(ids, past_key_values=cache, **settings).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_logits_equal_uncached_logits(family, kind):
    model = banded(family, sinks=True)
    ids = tokens(2, LENGTH)
    cache = make_cache(kind, model)
    pieces = [9, 1, 1, 7, 23, *[1] * 25]
    close(in_pieces(model, ids, pieces, cache), logits(model, ids, use_cache=False), **EXACT)
    assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["olmoe", "llama"])  # MHA and GQA
@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_in_float32(name, family, kind):
    model = banded(family, PATTERNS[name]).float()
    ids = tokens(1, LENGTH)
    plain = logits(model, ids, use_cache=False)
    found = in_pieces(model, ids, [40, 17, *[1] * 9], make_cache(kind, model))
    assert (found - plain).abs().max() <= 1e-4 * plain.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_error_is_that_without_a_cache(kind):
    """Bfloat16 adds no more error than it has without a cache."""
    ids = tokens(1, LENGTH)
    exact = logits(banded("llama"), ids, use_cache=False)
    model = banded("llama").bfloat16()
    plain = logits(model, ids, use_cache=False)
    found = in_pieces(model, ids, [40, 17, *[1] * 9], make_cache(kind, model))
    check_error("logits", found, plain, exact)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [None, 5])
def test_greedy_generation_with_left_padding(family, chunk):
    """Chunk 5 leaves a row with a chunk of padding alone."""
    model = banded(family, sinks=True)
    ids = tokens(2, 18)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    wanted = generated(model, ids, attention_mask=mask)
    found = generated(
        model, ids, BandCache(model.config), attention_mask=mask, prefill_chunk_size=chunk
    )
    assert found == wanted


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_chunks_of_padding_alone_in_other_caches(kind):
    """They were once taken for packed rows, because positions do not rise inside padding."""
    model = banded("llama")
    ids = tokens(2, 18)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    wanted = generated(model, ids, attention_mask=mask)
    cache = make_cache(kind, model)
    assert generated(model, ids, cache, attention_mask=mask, prefill_chunk_size=5) == wanted


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=["sampling", "beams", "sampled_beams", "two_of_each"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_sampling_and_beam_search(options, kind):
    model = banded("llama", sinks=True)
    ids = tokens(2, 10)
    assert generated(model, ids, make_cache(kind, model), **options) == generated(
        model, ids, **options
    )


def test_assisted_generation_takes_drafts_back():
    model = banded("llama")
    ids = tokens(1, 6).repeat(1, 4)  # repeats itself, so that drafts are found
    wanted = generated(model, ids)
    assert generated(model, ids, BandCache(model.config), prompt_lookup_num_tokens=4) == wanted
    helper = build("llama", seed=1)
    cache = BandCache(model.config, slack=24)
    assert generated(model, ids, cache, assistant_model=helper) == wanted


@pytest.mark.parametrize("max_rollback", [0, 3, spa.rings.SLACK])
@pytest.mark.parametrize("drafts", [{}, {"num": 45}, {"num": 1, "schedule": "heuristic"}], ids=str)
def test_drafts_of_any_length_are_taken_back(drafts, max_rollback):
    """Transformers' defaults, drafts longer than the room for them, and drafts that grow."""
    model, ids = banded("llama", max_position_embeddings=256), tokens(1, 20)
    wanted = generated(model, ids, max_new_tokens=40)
    for helper in (banded("llama", seed=1), model):  # all drafts wrong, all right
        chosen = helper.generation_config
        chosen.num_assistant_tokens = drafts.get("num")
        chosen.num_assistant_tokens_schedule = drafts.get("schedule")
        chosen.assistant_confidence_threshold = 0.0
        cache = BandCache(model.config, max_rollback=max_rollback)
        options = {"max_new_tokens": 40, "assistant_model": helper}
        assert generated(model, ids, cache, **options) == wanted
        length = int(cache.get_seq_length())
        assert length == 59
        # Goes on, with and without drafts.
        text = torch.tensor(wanted)
        longer = generated(model, text, max_new_tokens=8)
        again = copy.deepcopy(cache)
        assert generated(model, text, again, max_new_tokens=8) == longer
        assert again.layers[0].store.max_rollback == again.layers[0].max_rollback
        options["max_new_tokens"] = 8
        assert generated(model, text, cache, **options) == longer


def test_a_saved_model_generates_the_same(tmp_path):
    model = banded("llama", sinks=True)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    ids = tokens(1, 20)
    assert generated(loaded, ids, BandCache(loaded.config)) == generated(model, ids)


def test_layers_left_alone_keep_their_own_cache():
    model = spa.hf.apply(build("llama"), (None, FIRST))
    ids = tokens(2, LENGTH)
    mask = torch.ones_like(ids[:, :18])
    mask[0, :5] = 0
    cache = BandCache(model.config)
    plain = logits(model, ids, use_cache=False)
    close(in_pieces(model, ids, [20, 9, *[1] * 37], cache), plain, **EXACT)
    assert isinstance(cache.layers[0], transformers.cache_utils.DynamicLayer)
    assert not cache.is_compileable
    wanted = generated(model, ids[:, :18], attention_mask=mask)
    assert generated(model, ids[:, :18], BandCache(model.config), attention_mask=mask) == wanted


def test_memory_stays_below_that_of_all_keys():
    """Memory stays and is less than that of all keys."""
    model = banded("llama")
    cache = BandCache(model.config)
    assert cache.nbytes == 0
    logits(model, tokens(1, 1), past_key_values=cache)
    first = cache.nbytes
    addresses = [layer.keys.data_ptr() for layer in cache.layers]
    logits(model, tokens(1, LENGTH), past_key_values=cache)
    assert cache.nbytes == first
    assert [layer.keys.data_ptr() for layer in cache.layers] == addresses
    slots = [spa.rings.ring_lengths(pattern, 2) for pattern in (FIRST, SECOND)]
    assert first == sum(sum(rings) + 1 for rings in slots) * 2 * 8 * 8


def test_a_prefix_is_copied_repeated_and_split():
    model = banded("llama")
    ids = tokens(3, 40)
    cache = BandCache(model.config)
    logits(model, ids[:, :30], past_key_values=cache)
    again = copy.deepcopy(cache).to("cpu")
    wanted = logits(model, ids, use_cache=False)[:, 30:]
    close(in_pieces(model, ids[:, 30:], [3, 1, 6], cache), wanted, **EXACT)
    again.batch_select_indices(torch.tensor([2, 0]))
    again.batch_repeat_interleave(2)
    assert again.batch_size == 4
    rows = [2, 2, 0, 0]
    close(in_pieces(model, ids[rows, 30:], [1, 9], again), wanted[rows], **EXACT)
    again.crop(-10)
    close(in_pieces(model, ids[rows, 30:], [10], again), wanted[rows], **EXACT)


def test_reset_starts_anew():
    model = banded("llama")
    cache = BandCache(model.config)
    logits(model, tokens(2, 50), past_key_values=cache)
    cache.reset()
    ids = tokens(2, 40, seed=3)
    found = in_pieces(model, ids, [11, 1, 28], cache)
    close(found, logits(model, ids, use_cache=False), **EXACT)


def test_packed_rows_are_read_and_not_continued():
    model = banded("llama")
    ids = tokens(1, 12)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    cache = BandCache(model.config)
    wanted = torch.cat([logits(model, part) for part in ids.split([7, 5], dim=1)], dim=1)
    close(logits(model, ids, position_ids=positions, past_key_values=cache), wanted, **EXACT)
    with pytest.raises(ValueError, match="must hold one document per row to be continued"):
        logits(model, ids[:, :1], past_key_values=cache)
    offsets = torch.tensor([0, 7, 12], dtype=torch.int32)
    flat = {
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": 7,
        "max_length_k": 7,
    }
    with pytest.raises(ValueError, match="must not be a BandCache with `cu_seq_lens_q`"):
        logits(model, ids, position_ids=positions, past_key_values=BandCache(model.config), **flat)


def test_another_pattern_is_refused():
    model = banded("llama", (FIRST, SECOND))
    other = banded("llama", (FIRST, FIRST))
    ids = tokens(1, 9)
    with pytest.raises(ValueError, match="must have been made for this layer's pattern"):
        logits(other, ids, past_key_values=BandCache(model.config))
    cache = BandCache(model.config)
    logits(model, ids, past_key_values=cache)
    before = copy.deepcopy(cache)
    with pytest.raises(ValueError, match="must have been filled under this layer's pattern"):
        logits(other, ids, past_key_values=cache)
    assert cache.layers[1].store.position.tolist() == [9]
    close(cache.layers[1].keys, before.layers[1].keys)


@pytest.mark.parametrize("own", ["sdpa", "eager"])
def test_another_attention_is_refused(own):
    cache = BandCache(banded("llama").config)
    with pytest.raises(ValueError, match=r"must be read by the bands .* got another attention"):
        logits(build("llama", own), tokens(1, 9), past_key_values=cache)
    alone = spa.hf.apply(build("llama", own), (None, FIRST))
    with pytest.raises(ValueError, match=r"must be read by the bands .* got another attention"):
        logits(alone, tokens(1, 9), past_key_values=BandCache(banded("llama").config))
    handle, _ = cache.layers[0].update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8))
    with pytest.raises(ValueError, match="asks for `matmul`"):
        torch.matmul(torch.zeros(1), handle)


@pytest.mark.parametrize("version", [2, 3])
def test_keys_computed_from_the_cache_are_refused(version):
    """Multi-head latent attention caches what its keys are computed from."""
    from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config

    config = (DeepseekV2Config if version == 2 else DeepseekV3Config)(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
        first_k_dense_replace=2,
    )
    model = spa.hf.apply(AutoModelForCausalLM.from_config(config).eval(), FIRST)
    message = r"must not be a BandCache for .* multi-head latent attention .*: use .* DynamicCache"
    with pytest.raises(ValueError, match=message):
        logits(model, tokens(1, 9), past_key_values=BandCache(model.config))
    found = in_pieces(model, tokens(1, 9), [5, 4], transformers.DynamicCache(config=config))
    close(found, logits(model, tokens(1, 9), use_cache=False), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_changes_size_is_refused(kind):
    model = banded("llama")
    cache = make_cache(kind, model)
    logits(model, tokens(2, 30), past_key_values=cache)
    before = copy.deepcopy(cache)
    for rows in (1, 3):
        with pytest.raises(ValueError, match=f"filled with, 2 rows, got {rows} in layer 0"):
            logits(model, tokens(rows, 1), past_key_values=cache)
    for old, new in zip(before.layers, cache.layers):
        close(new.keys, old.keys)
        assert new.get_seq_length() == 30


def test_a_text_longer_than_a_static_cache_is_refused():
    model = banded("llama")
    cache = make_cache("static", model)
    with pytest.raises(ValueError, match="must have room for 67 tokens, got a cache for 66"):
        logits(model, tokens(1, LENGTH + 1), past_key_values=cache)
    logits(model, tokens(1, LENGTH), past_key_values=cache)
    before = copy.deepcopy(cache)
    with pytest.raises(ValueError, match="must have room for 67 tokens, got a cache for 66"):
        logits(model, tokens(1, 1), past_key_values=cache)
    close(cache.layers[0].keys, before.layers[0].keys)


@pytest.mark.parametrize("span", [40, 2**29])
def test_a_cache_takes_no_more_than_the_text_needs(span):
    """Whatever span a config names: a text longer than the first room gets more."""
    bands = (((0, 4),), ((0, span),), ((0, 2), (6, 30)), ((0, 1), (9, span)))
    model = banded("llama", P(intervals=bands, span=span), max_position_embeddings=16)
    same = banded("llama", P(intervals=tuple((*b[:-1], (b[-1][0], min(b[-1][1], LENGTH)))
                                             for b in bands), span=LENGTH))  # fmt: skip
    ids = tokens(2, LENGTH)
    wanted = logits(same, ids, use_cache=False)
    cache = BandCache(model.config)
    assert not cache.is_compileable
    close(in_pieces(model, ids[:, :16], [9, 1, 6], cache), wanted[:, :16], **EXACT)
    assert cache.layers[0].store.layout.ring_lengths == (16 + 32,) * 2
    first = cache.nbytes
    close(in_pieces(model, ids[:, 16:], [1, 19, *[1] * 30], cache), wanted[:, 16:], **EXACT)
    assert first < cache.nbytes <= 4 * first
    assert cache.is_compileable == (span == 40)
    long = BandCache(model.config)  # a prompt longer than the first room
    close(in_pieces(model, ids, [60, 6], long), wanted, **EXACT)
    roomy = BandCache(model.config, capacity=span if span == 40 else LENGTH)
    assert roomy.is_compileable == (span == 40)
    close(in_pieces(model, ids, [60, 6], roomy), wanted, **EXACT)


def test_compiled_decoding_is_one_graph():
    model = banded("llama", sinks=True)
    ids = tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    wanted = logits(model, ids, attention_mask=mask, position_ids=positions, use_cache=False)
    cache = BandCache(model.config)
    some = {"attention_mask": mask[:, :30], "position_ids": positions[:, :30]}
    logits(model, ids[:, :30], past_key_values=cache, **some)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(model.forward, fullgraph=True, backend=counting)
    for at in range(30, 40):
        # What `generate` does for a cache with static shapes: the mask is made outside the graph.
        rows = spa.hf.mask.rows_mask(
            2, 1, at + 1, torch.tensor(at), attention_mask=mask[:, : at + 1]
        )
        with torch.no_grad():
            found = step(
                ids[:, at : at + 1],
                attention_mask=rows,
                position_ids=positions[:, at : at + 1].contiguous(),
                past_key_values=cache,
            ).logits
        close(found[:, 0], wanted[:, at], **EXACT)
    assert len(graphs) == 1


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_generate_compiles_by_itself(family):
    """As it does on a GPU; a compiler that only records graphs stands for the one that is there."""
    model = banded(family, sinks=True)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False}
    wanted = model.generate(ids, **options, use_cache=False)
    graphs = []

    def counting(graph, inputs, **_):
        graphs.append(graph)
        return graph.forward

    config = transformers.CompileConfig(fullgraph=True, backend=counting, mode=None)
    config._compile_all_devices = True
    found = model.generate(
        ids, **options, past_key_values=BandCache(model.config), compile_config=config
    )
    assert torch.equal(found, wanted)
    assert len(graphs) == 1
