"""MEA against its equations, its limits, and its two conversions."""

from __future__ import annotations

import pytest
import torch
import transformers
from relatives import EXCLUSIVE, HEADS, SPAN, build, inputs, logits, scatter, tokens
from torch.nn.functional import scaled_dot_product_attention

import spattention as spa
from spattention import related
from spattention.related.mea import MEA, fold, mix_heads, split_heads
from spattention.related.method import norm_heads

close = torch.testing.assert_close
EXACT = {"rtol": 0.0, "atol": 1e-10}
FAMILIES = ("llama", "olmoe", "qwen3")


def reference(query, key, value, mixings, gain, scale):
    """Eqs. 10 to 12 as sums over components, in float64."""
    heads = mixings[0].shape[1]
    key, value = (
        torch.stack([sum(w[c, a] * t[:, c] for c in range(len(w))) for a in range(heads)], dim=1)
        for w, t in zip(mixings, (key, value))
    )
    group = query.shape[1] // heads
    scores = query @ key.repeat_interleave(group, dim=1).mT * scale
    past = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    out = scores.masked_fill(~past, -torch.inf).softmax(dim=-1)
    out = out @ value.repeat_interleave(group, dim=1)
    return out / (out.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * gain


@pytest.mark.parametrize("components", [1, 2])
def test_a_layer_is_its_equations(components):
    query, key, value = inputs(23)
    key, value = key[:, :components], value[:, :components]
    model = related.apply(build("llama"), MEA(HEADS, SPAN, components=components))
    layer = scatter(model).model.layers[0].self_attn
    weights = layer.head_mixing
    found = layer.baseline_attention.attend(query, key, value, 0.3)
    mixings = weights.key_mixing, weights.value_mixing
    close(found, reference(query, key, value, mixings, weights.gain, 0.3), **EXACT)


def test_the_identity_without_norm_is_dense_bit_by_bit():
    for family in FAMILIES:
        model, ids = build(family), tokens(2, 33)
        wanted = logits(model, ids)
        assert torch.equal(logits(related.apply(model, MEA(HEADS, SPAN, norm=0)), ids), wanted)


def test_the_identity_without_norm_is_bands_bit_by_bit():
    for family in FAMILIES:
        ids = tokens(2, 33)
        wanted = logits(spa.hf.apply(build(family), EXCLUSIVE), ids)
        model = related.apply(build(family), MEA(HEADS, SPAN, EXCLUSIVE, norm=0))
        assert torch.equal(logits(model, ids), wanted)


def test_the_norm_is_there_from_the_start():
    """An identity start is multi-head attention in its mixing alone."""
    model, ids = build("llama"), tokens(2, 33)
    wanted = logits(model, ids)
    assert not torch.allclose(logits(related.apply(model, MEA(HEADS, SPAN)), ids), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_are_mixed_before_their_norm(family):
    """Qwen3 norms each head, OLMoE all of them; rotary positions follow in both."""
    model, ids = build(family), tokens(1, 9)
    scatter(related.apply(model, MEA(HEADS, SPAN)))
    layer, caught = model.model.layers[0].self_attn, {}
    layer.k_proj.register_forward_hook(lambda m, args, out: caught.update(hidden=args[0], key=out))
    if hasattr(layer, "k_norm"):
        layer.k_norm.register_forward_hook(lambda m, args, out: caught.update(normed=args[0]))
    logits(model, ids)
    plain, heads = caught["hidden"] @ layer.k_proj.projection.weight.T, len(layer.k_proj.mixing)
    wanted = mix_heads(plain.unflatten(-1, (heads, -1)), layer.k_proj.mixing, dim=2).flatten(2)
    close(caught["key"], wanted, **EXACT)
    if hasattr(layer, "k_norm"):
        close(caught["normed"].reshape(wanted.shape), wanted, **EXACT)


def test_mixing_commutes_with_rotary_positions():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    _, key, _ = inputs(19)
    angles = torch.rand(1, 19, 4, dtype=torch.float64).repeat(1, 1, 2)
    mixing = torch.randn(2, 3, dtype=torch.float64)

    def turn(tensor):
        return apply_rotary_pos_emb(tensor, tensor, angles.cos(), angles.sin())[1]

    close(turn(mix_heads(key, mixing, dim=1)), mix_heads(turn(key), mixing, dim=1), **EXACT)


def test_permuted_columns_permute_the_heads():
    query, key, value = inputs(17)
    query = query[:, :2]
    mixing = torch.randn(2, 2, 2, dtype=torch.float64)

    def attend(order):
        mixed = [mix_heads(t, w[:, order], dim=1) for t, w in zip((key, value), mixing)]
        return scaled_dot_product_attention(query[:, order], *mixed, is_causal=True)

    close(attend([1, 0]), attend([0, 1])[:, [1, 0]], **EXACT)


def test_gradients_of_matrices_and_gain():
    model = related.apply(build("llama"), MEA(HEADS, SPAN, EXCLUSIVE, components=1))
    layer = scatter(model).model.layers[0].self_attn
    weights, given = layer.head_mixing, [t[:1] for t in inputs(9)]
    given[1:] = [t[:, :1] for t in given[1:]]
    names = ("key_mixing", "value_mixing", "gain")
    held = [getattr(weights, name).detach().requires_grad_() for name in names]

    def attend(*tensors):
        for name, tensor in zip(names, tensors[3:]):
            delattr(weights, name)
            setattr(weights, name, tensor)
        return layer.baseline_attention.attend(*tensors[:3], 0.4)

    torch.autograd.gradcheck(attend, [t.requires_grad_() for t in given] + held, fast_mode=True)


def test_empty_rows_stay_zero_and_without_gradient():
    """The last band of `exclusive` has no key for the first queries."""
    out = torch.zeros(1, 1, 3, 8, dtype=torch.float64, requires_grad=True)
    gain = torch.ones(8, dtype=torch.float64, requires_grad=True)
    normed = norm_heads(out, gain)
    assert not normed.any()
    normed.sum().backward()
    assert torch.isfinite(out.grad).all()
    assert not gain.grad.any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bands", [None, EXCLUSIVE])
def test_folding_keeps_the_outputs(family, bands):
    """Without the norm, what is left is the model's own attention, or bands with their cache."""
    ids = tokens(2, 33)
    for norm in (0, 1):
        model = build(family, attention_bias=True)
        scatter(related.apply(model, MEA(HEADS, SPAN, bands, norm=norm)))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_()
        wanted = logits(model, ids)
        assert fold(model) is model
        close(logits(model, ids), wanted, **EXACT)
        kept = {name for name, _ in model.named_parameters() if "mixing" in name}
        gains = {f"model.layers.{k}.self_attn.head_mixing.gain" for k in range(3)}
        assert kept == (gains if norm else set())
        name = "mea" if norm else "sdpa" if bands is None else "spattention"
        assert model.config._attn_implementation == name
    if bands is not None:
        model = fold(scatter(related.apply(build(family), MEA(HEADS, SPAN, bands, norm=0))))
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        wanted = model.generate(ids, use_cache=False, **settings)
        cache = spa.hf.BandCache(model.config)
        assert model.generate(ids, past_key_values=cache, **settings).tolist() == wanted.tolist()


def test_a_folded_model_is_saved_as_what_it_is(tmp_path):
    model, ids = scatter(related.apply(build("llama"), MEA(HEADS, SPAN))), tokens(2, 33)
    wanted = logits(fold(model), ids)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    close(logits(again, ids), wanted, **EXACT)
    stock = fold(scatter(related.apply(build("llama"), MEA(HEADS, SPAN, norm=0))))
    stock.save_pretrained(tmp_path / "stock")
    assert "spattention" not in (tmp_path / "stock" / "config.json").read_text().lower()


def test_virtual_heads_fold_back_into_all_heads():
    model, ids = build("llama"), tokens(2, 33)
    scatter(related.apply(model, MEA(HEADS, SPAN, norm=0, components=1)))
    wanted = logits(model, ids)
    close(logits(fold(model), ids), wanted, **EXACT)


@pytest.mark.parametrize("bias", [False, True])
def test_the_error_of_virtual_heads_falls_to_zero(bias):
    torch.manual_seed(0)
    projection, hidden = torch.nn.Linear(20, 6 * 5, bias).double(), torch.randn(9, 20).double()
    wanted, errors = projection(hidden), []
    for components in range(1, 7):
        smaller, mixing = split_heads(projection, 6, components)
        found = mix_heads(smaller(hidden).unflatten(-1, (components, 5)), mixing, dim=1)
        errors.append((found.flatten(1) - wanted).norm().item())
    assert all(after < before for before, after in zip(errors, errors[1:]))
    assert errors[-1] < 1e-10
    ratio = smaller.weight.std() / projection.weight.std()
    assert 0.5 < ratio < 2  # one rate of learning fits both


def test_virtual_heads_halve_the_cache():
    ids = tokens(1, 20)
    for components, heads in ((2, 2), (1, 1)):
        model = related.apply(build("llama"), MEA(HEADS, SPAN, components=components))
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
        assert [layer.keys.shape[1] for layer in cache.layers] == [heads] * 3


def test_as_many_virtual_heads_as_heads_change_nothing():
    model, ids = build("llama"), tokens(2, 33)
    wanted = logits(model, ids)
    found = logits(related.apply(model, MEA(HEADS, SPAN, norm=0, components=2)), ids)
    close(found, wanted, **EXACT)


def test_models_that_cannot_mix_stay_as_they_are():
    for model, method, error in (
        (build("olmoe"), MEA(HEADS, SPAN, components=2), "must be 0 for a model with a norm of"),
        (build("qwen3"), MEA(HEADS, SPAN, components=1), "must be 0 for a model with a norm of"),
        (build("llama"), MEA(HEADS, SPAN, components=3), "at most the 2 key/value heads, got 3"),
        (fused(), MEA(HEADS, SPAN), "must have separate linear projections k_proj and v_proj"),
    ):
        before, ids = {n: p.shape for n, p in model.named_parameters()}, tokens(1, 9)
        wanted = logits(model, ids)
        with pytest.raises(ValueError, match=error):
            related.apply(model, method)
        assert {n: p.shape for n, p in model.named_parameters()} == before
        assert torch.equal(logits(model, ids), wanted)
    with pytest.raises(ValueError, match="must mix its heads, got one without `mea`"):
        fold(build("llama"))


def fused():
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": HEADS, "n_positions": 64, "vocab_size": 61}
    dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    ends = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    config = transformers.GPT2Config(**sizes, **dropout, **ends)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.double().eval()


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"mix": 0, "norm": 0}, "must not both be 0"),
        ({"mix": 0, "components": 2}, "need mix=1, got 2 with mix=0"),
        ({"components": 5}, "`components` of `mea` must be an integer from 0 to 4, got 5"),
        ({"bands": "exclusive"}, "must be a BandPattern or None, got 'exclusive'"),
        ({"norm": True}, "`norm` of `mea` must be an integer"),
    ],
)
def test_wrong_values_raise(values, error):
    with pytest.raises(ValueError, match=error):
        MEA(HEADS, SPAN, **values)


def test_lora_learns_behind_the_mixing():
    """An adapter of a component projection is mixed as the projection is, merged or not."""
    peft = pytest.importorskip("peft")
    ids = tokens(2, 30)
    settings = peft.LoraConfig(target_modules=["projection"], r=2, init_lora_weights=False)
    base = scatter(related.apply(build("llama"), MEA(HEADS, SPAN)))
    model = peft.get_peft_model(base, settings)
    wanted = logits(model, ids)
    close(logits(model.merge_and_unload(), ids), wanted, **EXACT)


def test_an_adapter_alone_does_not_bring_mea_back(tmp_path):
    """Its folder holds no mixing matrices."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj"], r=2)
    base = scatter(related.apply(build("llama"), MEA(HEADS, SPAN)))
    peft.get_peft_model(base, settings).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must come with its `mea` weights"):
        peft.PeftModel.from_pretrained(build("llama"), tmp_path)


@pytest.mark.parametrize("options", [{}, {"components": 2}, {"mix": 0}], ids=str)
def test_a_deleted_section_keeps_no_weights(options, tmp_path):
    """What the section's attention added would be saved, and mean nothing to a dense model."""
    model = related.apply(build("llama"), MEA(HEADS, SPAN, **options))
    del model.config.mea
    with pytest.raises(ValueError, match=r"`config\.mea` must be there to save a model"):
        model.save_pretrained(tmp_path)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"with the weights that it added, got none for model\."):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
