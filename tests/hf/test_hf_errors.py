"""What cannot be honoured raises a ValueError that names the argument, the rule and the value."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from tiny import FAMILIES, FIRST, HEADS, SECOND, SPAN, VOCABULARY, P, banded, build, logits, tokens
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import TransformersKwargs

import spattention as spa
from spattention.hf.attention import HONOURED, WITHOUT_EFFECT, attention_forward
from spattention.hf.context_parallel import SHARDS

FLAT = torch.tensor([0, 3, 8], dtype=torch.int32)
# Every keyword that a supported model passes on: a telling value, and the error, or None if the
# result stays the same.
KEYWORDS = {
    "scaling": (0.25, None),
    "dropout": (0.1, "attention dropout must be 0 for spattention, got 0.1"),
    "output_attentions": (True, "`output_attentions` must be False"),
    "softcap": (30.0, "`softcap` must be None for spattention, got 30.0"),
    "is_causal": (False, "must be causal for spattention, got `is_causal=False`"),
    "sliding_window": (2, None),  # a layer with a pattern has given its window up
    "position_ids": (torch.arange(8)[None], None),
    "cache_position": (torch.arange(8), None),
    "position_embeddings": ((torch.ones(1), torch.ones(1)), None),
    "use_cache": (True, None),
    "output_hidden_states": (True, None),
    "output_router_logits": (True, None),
    "num_items_in_batch": (torch.tensor(3), None),
    "logits_to_keep": (1, None),
    "labels": (torch.zeros(1), None),
    "return_dict": (True, None),
    "shift_labels": (torch.zeros(1, 8), None),
    "seq_idx": (torch.zeros(1, 8, dtype=torch.int32), None),
    "tokenizer": (object(), None),
    "assistant_tokenizer": (object(), None),
    "cu_seq_lens_q": (FLAT, "must come with all of"),
    # The other three mean nothing without the first.
    "cu_seq_lens_k": (FLAT, "`cu_seq_lens_q` must come with"),
    "max_length_q": (5, "`cu_seq_lens_q` must come with"),
    "max_length_k": (5, "`cu_seq_lens_q` must come with"),
}
REFUSED = {
    "position_bias": torch.zeros(1),
    "indices": torch.zeros(1),
    "block_indices": torch.zeros(1),
    "cache": object(),
    "something_new": 3,
}


def call(module, **keywords):
    query, key, value = torch.randn(3, 1, HEADS, 8, 8, dtype=torch.float64).unbind(0)
    settings = {"scaling": 0.25, "dropout": 0.0, **keywords}
    return attention_forward(module, query, key, value, None, **settings)[0]


@pytest.fixture(scope="module")
def module():
    return banded("llama").model.layers[0].self_attn


@pytest.mark.parametrize("name", [*KEYWORDS, *REFUSED])
def test_every_keyword_is_honoured_or_refused(name, module):
    given, message = KEYWORDS.get(
        name, (REFUSED.get(name), f"`{name}` is a keyword that spattention")
    )
    torch.manual_seed(0)
    plain = call(module)
    torch.manual_seed(0)
    if message is None:
        assert torch.equal(call(module, **{name: given}), plain)
    else:
        with pytest.raises(ValueError, match=message):
            call(module, **{name: given})


def test_the_sinks_of_gpt_oss_are_honoured(module):
    torch.manual_seed(0)
    plain = call(module)
    torch.manual_seed(0)
    assert not torch.equal(call(module, s_aux=torch.zeros(HEADS)), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_walk_covers_what_the_models_pass(family, monkeypatch):
    seen: set[str] = set()

    def record(module, query, key, value, attention_mask, **keywords):
        seen.update(keywords)
        return attention_forward(module, query, key, value, attention_mask, **keywords)

    model = banded(family)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "spattention", record)
    ids = tokens(1, 8)
    model(ids, labels=ids, output_hidden_states=True, num_items_in_batch=torch.tensor(8))
    model(ids, position_ids=torch.arange(8)[None], use_cache=False, return_dict=True)
    model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    model.generate(
        ids, max_new_tokens=2, do_sample=False, pad_token_id=0, cache_implementation="static"
    )
    assert {"scaling", "dropout"} <= seen <= set(KEYWORDS)


def test_declared_keywords_are_all_covered():
    """The walk covers the keywords that Transformers declares."""
    declared = {*TransformersKwargs.__annotations__, *FlashAttentionKwargs.__annotations__}
    assert declared <= set(KEYWORDS)
    assert set(KEYWORDS) - {"scaling", "dropout"} == (WITHOUT_EFFECT | HONOURED) - {"s_aux", SHARDS}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_says_what_it_cannot_do(family):
    model = banded(family)
    ids = tokens(2, 8)
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True
    with pytest.raises(ValueError, match="`something_new` is a keyword"):
        model(ids, something_new=1)
    with pytest.raises(ValueError, match="must be causal for spattention"):
        model(ids, is_causal=False)
    dropping = banded(family, attention_dropout=0.1)
    logits(dropping, ids)
    with pytest.raises(ValueError, match=r"attention dropout must be 0 for spattention, got 0\.1"):
        dropping.train()(ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_that_are_not_padding_are_refused(family):
    model = banded(family)
    ids = tokens(2, 8)
    for dtype in (torch.bool, torch.float64, torch.int32):
        with pytest.raises(ValueError, match=r"2-D padding mask .* got shape \[2, 1, 8, 8\]"):
            model(ids, attention_mask=torch.ones(2, 1, 8, 8).to(dtype))


def test_masks_with_added_rules_are_refused():
    spa.hf.register()
    config = banded("llama").config
    inputs = {
        "config": config,
        "inputs_embeds": torch.zeros(1, 6, 32),
        "attention_mask": None,
        "past_key_values": None,
    }
    from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

    def other(batch, head, query, key):
        return key <= query

    for rule in ("or_mask_function", "and_mask_function"):
        with pytest.raises(ValueError, match="got one with an added rule"):
            create_causal_mask(**inputs, **{rule: other})
    blocks = torch.tensor([[-1, 0, 0, -1, -1, -1]])
    with pytest.raises(ValueError, match="got one with an added rule"):
        create_causal_mask(**inputs, block_sequence_ids=blocks)
    del inputs["past_key_values"]
    with pytest.raises(ValueError, match="got a bidirectional mask"):
        create_bidirectional_mask(**inputs)
    rows_mask = AttentionMaskInterface()["spattention"]
    with pytest.raises(ValueError, match="got a mask that sees later tokens"):
        rows_mask(1, 6, 6, mask_function=lambda b, h, q, k: (q >= 0) & (k >= 0))


def test_flattened_packing_is_checked():
    model = banded("llama")
    flat = {"cu_seq_lens_q": FLAT, "cu_seq_lens_k": FLAT, "max_length_q": 5, "max_length_k": 5}
    with pytest.raises(ValueError, match=r"must describe one row .* got 2 rows of 8 queries"):
        model(tokens(2, 8), **flat)
    with pytest.raises(ValueError, match="`cu_seqlens_q` must end at the number of tokens, 9"):
        model(tokens(1, 9), **flat)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="must be None with `cu_seq_lens_q`, got a padding mask"):
        model(tokens(1, 8), attention_mask=mask, **flat)


def test_apply_names_what_does_not_fit():
    model = build("llama")
    dense = P.dense(HEADS, SPAN)
    cases = [
        ("`pattern` has 3 heads but layer 0 of the model has 4", (P.dense(3, SPAN),), {}),
        ("one .or None. per layer, 2, got 3", ([dense] * 3,), {}),
        ("one .or None. per layer, 1, got 2", ([dense] * 2,), {"layers": [1]}),
        ("per layer, 2, got str", ("dense",), {}),
        ("must hold BandPattern or None, got str for layer 1", ([dense, "dense"],), {}),
        ("must hold at least one BandPattern", ([None, None],), {}),
        (r"distinct indices from 0 to 1 of text layers, got \[2\]", (dense,), {"layers": [2]}),
        (r"distinct indices .* got \[0, 0\]", (dense,), {"layers": [0, 0]}),
        ("`layers` must be indices of text layers, got 1", (dense,), {"layers": 1}),
        ("`layers` must name at least one text layer, got none", (dense,), {"layers": []}),
        ("`layers` must name at least one text layer, got none", ([],), {"layers": ()}),
        ("`sinks` must be from -65504 to 65504, got nan", (dense,), {"sinks": float("nan")}),
        ("`sinks` must be True, .* got Tensor", (dense,), {"sinks": torch.zeros(HEADS)}),
        ("`sinks` must be True, .* got str", (dense,), {"sinks": "yes"}),
        ("`sinks` must be one per layer, 2, got 1", (dense,), {"sinks": [torch.zeros(HEADS)]}),
        (
            r"`sinks` of layer 1 must have the shape \[4\], got \[1\]",
            (dense,),
            {"sinks": [torch.zeros(HEADS), torch.zeros(1)]},
        ),
        (
            "`sinks` of layer 0 must be a tensor of floating point, got torch.int64",
            (dense,),
            {"sinks": [torch.zeros(HEADS, dtype=torch.int64)] * 2},
        ),
        (
            "`sinks` of layer 1 must be from -65504 to 65504, got",
            (dense,),
            {"sinks": [torch.zeros(HEADS), torch.full((HEADS,), float("inf"))]},
        ),
        (
            "`sinks` of layer 0 must be None, since it has no pattern, got values",
            ([None, dense],),
            {"sinks": [torch.zeros(HEADS)] * 2},
        ),
    ]
    for message, arguments, keywords in cases:
        with pytest.raises(ValueError, match=message):
            spa.hf.apply(model, *arguments, **keywords)
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model.config, "spattention")
    assert torch.equal(logits(model, tokens(1, 9)), logits(build("llama"), tokens(1, 9)))
    with pytest.raises(ValueError, match="must be a Transformers model, got Linear"):
        spa.hf.apply(torch.nn.Linear(2, 2), dense)


def test_models_that_cannot_run_bands_are_refused():
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    width = {"vocab_size": VOCABULARY, "intermediate_size": 48}
    pattern = P.dense(HEADS, SPAN)
    bert = transformers.BertModel(transformers.BertConfig(**small, **width))
    with pytest.raises(ValueError, match="must be causal, got bidirectional attention"):
        spa.hf.apply(bert, pattern)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCABULARY, d_model=32, d_ff=48, num_layers=1, num_heads=4)
    )
    with pytest.raises(ValueError, match="must be a decoder alone, got an encoder-decoder"):
        spa.hf.apply(t5, pattern)
    gemma = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**small, **width, num_key_value_heads=2, head_dim=8)
    )
    with pytest.raises(ValueError, match="must not cap its scores"):
        spa.hf.apply(gemma, pattern)
    gptj = transformers.GPTJForCausalLM(
        transformers.GPTJConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    )
    with pytest.raises(ValueError, match="must use Transformers' attention interface, which GPTJ"):
        spa.hf.apply(gptj, pattern)
    eager = build("llama", "eager")
    eager.config.output_attentions = True
    with pytest.raises(ValueError, match="must not return attention weights"):
        spa.hf.apply(eager, pattern)


def test_implementation_without_pattern_refused():
    """The implementation without a pattern is refused."""
    spa.hf.register()
    model = build("llama")
    model.set_attn_implementation("spattention")
    with pytest.raises(ValueError, match="needs a pattern for every attention module"):
        model(tokens(1, 8))


def rank_of(model, rank, lowered=False):
    """One of two tensor-parallel ranks: half the rows of the projections, half the columns of the
    last one. `lowered`: `out_features` too, as in some versions of Transformers.
    """
    part = copy.deepcopy(model)
    part._tp_size = 2 if lowered else None
    for layer in part.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            projection = getattr(layer.self_attn, name)
            projection.weight = torch.nn.Parameter(projection.weight.chunk(2, dim=0)[rank])
            if lowered:
                projection.out_features //= 2
        projection = layer.self_attn.o_proj
        projection.weight = torch.nn.Parameter(projection.weight.chunk(2, dim=1)[rank])
    return part


def attend(model, hidden):
    positions = model.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    with torch.no_grad():
        attention = model.model.layers[0].self_attn
        return attention(hidden, position_embeddings=positions, attention_mask=None)[0]


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("pattern", [FIRST, SECOND], ids=["named", "custom"])
def test_tensor_parallel_needs_its_part(pattern, lowered):
    """Whether a part fits is read off the weights: a pattern's recipe is for readers."""
    stock = build("llama")
    hidden = torch.randn(1, 8, 32, dtype=torch.float64)
    wanted = attend(spa.hf.apply(copy.deepcopy(stock), pattern), hidden)
    found = torch.zeros_like(wanted)
    for rank, part in enumerate((pattern.heads(0, 2), pattern.heads(2, 4))):
        found += attend(spa.hf.apply(rank_of(stock, rank, lowered), part), hidden)
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-10)

    whole = spa.hf.apply(rank_of(stock, 0, lowered), pattern)
    with pytest.raises(ValueError, match=r"`pattern` has 4 heads but `query` has 2: under tensor"):
        attend(whole, hidden)
    with pytest.raises(ValueError, match=r"has 1 heads but layer 0 .* has 4, 2 of them on this"):
        spa.hf.apply(rank_of(stock, 0, lowered), pattern.heads(0, 1))
    with pytest.raises(ValueError, match=r"`pattern` has 2 heads but layer 0 of the model has 4$"):
        spa.hf.apply(stock, pattern.heads(0, 2))


def test_a_refused_build_leaves_the_other_model():
    """A refused build leaves the model that lent its config."""
    model, ids = banded("llama", P.exclusive(HEADS, SPAN)), tokens(1, 9)
    before = logits(model, ids)
    with pytest.raises(ValueError, match=r'must be "spattention" for a model .* got "sdpa"'):
        transformers.AutoModelForCausalLM.from_config(model.config, attn_implementation="sdpa")
    assert torch.equal(logits(model, ids), before)


def test_the_advice_on_dropout_helps(tmp_path):
    """GPT-2 reads its config when it is built, and calls its entry otherwise."""
    shape = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    config = transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0, use_cache=False)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    pattern = spa.BandPattern.shared_local(4, 64)

    def train(**options):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        spa.hf.apply(model, pattern).train()(torch.arange(8)[None])

    with pytest.raises(ValueError, match=r"load the model with `attn_pdrop=0\.0`, or put that"):
        train()
    train(attn_pdrop=0.0)
