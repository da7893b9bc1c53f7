"""Baselines in models of Transformers: their masks, Reformer, and models that refuse them."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from small_models import CHOSEN, HEADS, LAYERS, MASKED, SPAN, build, tokens

import spattention as spa
from spattention import baselines
from spattention.baselines import BigBird, Longformer, PublishedMask, Reformer
from spattention.choice import attention_choice
from spattention.hf.section import KINDS

close = torch.testing.assert_close
EXACT = {"rtol": 0.0, "atol": 1e-10}
FAMILIES = ("olmoe", "llama")
each_baseline = pytest.mark.parametrize("name", CHOSEN)
each_family = pytest.mark.parametrize("family", FAMILIES)


def model_with(name, family="llama", **overrides):
    return baselines.apply(build(family, **overrides), CHOSEN[name])


def logits(model, ids, **keywords):
    with torch.no_grad():
        return model(ids, **keywords).logits


@each_family
@pytest.mark.parametrize("name", MASKED)
def test_a_model_runs_the_mask_of_each_layer(name, family):
    """Stock attention under the same masks, handed in as 4-D masks, gives the same logits."""
    stock, ids = build(family), tokens(2, 33)
    for index, layer in enumerate(stock.model.layers):
        mask = CHOSEN[name].layer(index, LAYERS).dense(33, 33, torch.device("cpu"))[None]

        def hook(module, args, keywords, mask=mask):
            return args, {**keywords, "attention_mask": mask}

        layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)
    close(logits(model_with(name, family), ids), logits(stock, ids), **EXACT)


@each_family
def test_an_edit_under_reformer_with_fixed_buckets(family, monkeypatch):
    model, ids = model_with("reformer", family), tokens(1, SPAN)
    table = torch.randint(0, 8, (3, 1, HEADS, SPAN), generator=torch.Generator().manual_seed(0))
    kind = type(model.model.layers[0].self_attn.baseline_attention)
    monkeypatch.setattr(kind, "hash", lambda self, shared: table)
    before, t = logits(model, ids), 20
    edited = ids.clone()
    edited[0, t] = 2 + (ids[0, t] - 1) % 50
    after = logits(model, edited)
    assert torch.equal(after[:, :t], before[:, :t])
    assert (after != before).any(dim=-1)[0, t:].sum() > 10


@each_family
def test_reformer_shares_queries_and_keys(family):
    model, stock = model_with("reformer", family), build(family)
    names = {name for name, _ in model.named_parameters()}
    gone = {name for name, _ in stock.named_parameters()} - names
    assert gone
    assert all(".k_proj." in name or ".k_norm." in name for name in gone)
    model.train()
    model(tokens(2, 30), labels=tokens(2, 30)).loss.backward()
    for name, parameter in model.named_parameters():
        assert "self_attn" not in name or parameter.grad.abs().sum() > 0, name


def test_lora_of_reformer_is_on_queries_and_keys():
    """LoRA on the queries of reformer is on its keys too."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(model_with("reformer", "llama"), settings)
    ids = tokens(2, 30)
    with torch.no_grad():
        adapted = model(ids).logits
        with model.disable_adapter():
            assert (model(ids).logits - adapted).abs().max() > 1e-3
    model(ids, labels=ids).loss.backward()
    trained = [p for name, p in model.named_parameters() if "lora" in name]
    assert trained
    assert all(p.grad.abs().sum() > 0 for p in trained)


def test_old_folders_load(tmp_path):
    """Saved before the marks were written: the section and the name of the attention alone."""
    model, ids = model_with("longformer"), tokens(2, 33)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["fusion_config"]
    config["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    close(logits(again, ids), logits(model, ids), **EXACT)


def test_a_config_of_an_unknown_kind_stays_marked(tmp_path, monkeypatch):
    """Saved again by a process that has registered bands and no baselines."""
    model_with("bigbird").save_pretrained(tmp_path)
    monkeypatch.delitem(KINDS, "bigbird")
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["SpattentionLlamaForCausalLM"]
    assert list(config["fusion_config"]) == [
        "bigbird: spattention.baselines.register() must be called before this model is loaded"
    ]


def test_a_dense_moment_does_not_lose_a_baseline(tmp_path):
    """`set_attn_implementation` changes nothing of what is saved, nor what may be put in."""
    model, ids = model_with("bigbird"), tokens(2, 33)
    wanted = logits(model, ids)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match='must have stock attention or bands, got "bigbird"'):
        spa.hf.apply(model, spa.BandPattern.exclusive(HEADS, SPAN))
    with pytest.raises(ValueError, match="must have stock attention for longformer, got bigbird"):
        baselines.apply(model, CHOSEN["longformer"])
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    close(logits(again, ids), wanted, **EXACT)


@each_baseline
def test_models_that_refuse_a_baseline_stay(name):
    """Models that cannot have a baseline stay as they are."""
    chosen = CHOSEN[name]
    ids = tokens(1, 9)
    banded = spa.hf.apply(build("llama"), spa.BandPattern.exclusive(HEADS, SPAN))
    other = "longformer" if chosen.kind == "bigbird" else "bigbird"
    for model, error in (
        (banded, "must have stock attention"),
        (model_with(other), f"must have stock attention for {chosen.kind}, got {other}"),
        (build("llama", num_attention_heads=8), f"has {HEADS} heads but the model has 8"),
    ):
        before = logits(model, ids)
        with pytest.raises(ValueError, match=error):
            baselines.apply(model, chosen)
        assert torch.equal(logits(model, ids), before)


@each_baseline
def test_a_model_with_a_baseline_takes_no_other(name):
    """Its section would be saved beside the other attention's name."""
    model, ids, kind = model_with(name), tokens(1, 9), CHOSEN[name].kind
    before = logits(model, ids)
    with pytest.raises(ValueError, match=f'must have stock attention or bands, got "{kind}"'):
        spa.hf.apply(model, spa.BandPattern.exclusive(HEADS, SPAN))
    with pytest.raises(ValueError, match=f"must have stock attention for dense, got {kind}"):
        attention_choice("dense", HEADS, SPAN).apply(model)
    assert torch.equal(logits(model, ids), before)


def test_windows_of_the_models_own_are_refused():
    config = transformers.MistralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=HEADS, num_key_value_heads=2, sliding_window=4,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config)
    with pytest.raises(ValueError, match="must not have sliding windows of its own"):
        baselines.apply(model, CHOSEN["longformer"])


def test_reformer_needs_separate_projections():
    config = transformers.GPTNeoXConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=HEADS,
    )  # fmt: skip
    model = transformers.GPTNeoXForCausalLM(config)
    with pytest.raises(ValueError, match="must have separate projections q_proj and k_proj"):
        baselines.apply(model, CHOSEN["reformer"])


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Longformer(4, 48, narrow=9, wide=3), "`narrow` of `longformer` must be"),
        (lambda: Longformer(4, 48, wide=49), "from 1 to 48, got 49"),
        (lambda: Longformer(4, 48, dilated_heads=5), "`dilated_heads` of `longformer`"),
        (lambda: BigBird(4, 48, block=0), "`block` of `bigbird` must be an integer from 1 to 48"),
        (lambda: BigBird(4, 2**20, block=1), "must cut `span` = 1048576 into at most 4096 blocks"),
        (lambda: BigBird(4, 48, random=-1), "`random` of `bigbird`"),
        (lambda: Reformer(4, 48, buckets=5), "`buckets` of `reformer` must be even, got 5"),
        (lambda: Reformer(4, 48, rounds=0), "`rounds` of `reformer`"),
        (lambda: PublishedMask(4, 7), "`span` of `published_mask`"),
        (lambda: PublishedMask(4, 48, mask="sparse"), "`mask` of `published_mask` must be one of"),
        (lambda: BigBird.from_section({"version": 2}), "must be a section of version 1"),
        (lambda: BigBird.from_section({"version": 1, "seed": 0}), "must have the entries"),
    ],
)
def test_wrong_values_raise(make, error):
    with pytest.raises(ValueError, match=error):
        make()


def test_a_model_with_two_sections_is_not_loaded(tmp_path):
    model = model_with("bigbird")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["attn_implementation"] = "sdpa"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match='`attn_implementation` must be "bigbird" for a model'):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
