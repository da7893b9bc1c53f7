"""Heads of models dealt to ranks: results stay, or the model is refused by name."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from tiny import COMMON, HEADS, logits, tokens

import spattention as spa

# Two ranks: the second and third head change places.
UNEQUAL = spa.BandPattern((((0, 24),), ((0, 20),), ((0, 2),), ((0, 3),)), 24, prefix=3)
ORDER = (0, 2, 1, 3)
GROUPS = {"num_key_value_heads": HEADS, "intermediate_size": 48, "num_hidden_layers": 1}
REST = r"`model` must have nothing but projections, norms .* in layer 0 .*, got {}"


def banded(family: str, sinks=False, **over):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **GROUPS, **over})
    model = getattr(transformers, f"{family}ForCausalLM")(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return spa.hf.apply(model, UNEQUAL, sinks=sinks)


def lora(model, *projections):
    how = LoraConfig(r=2, init_lora_weights=False, target_modules=list(projections))
    return get_peft_model(model, how).eval()


@pytest.mark.parametrize(
    ("family", "over"),
    [
        ("Llama", {"attention_bias": True}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 8}),
        ("Olmo", {}),
        ("Olmo2", {}),
        ("Gemma", {"head_dim": 8}),
        ("Cohere", {}),
        ("StableLm", {}),
    ],
)
def test_dealt_families_keep_their_results(family, over):
    model, ids = banded(family, **over), tokens(1, 24)
    wanted = logits(model, ids)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    spa.hf.deal(model, 2)
    assert model.model.layers[0].self_attn.spattention_order == ORDER
    # Norms compute in float32, and those over all heads then round otherwise.
    close = 1e-6 * float(wanted.abs().max())
    torch.testing.assert_close(logits(model, ids), wanted, rtol=0, atol=close)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.parametrize(
    ("family", "over", "named"),
    [
        ("BitNet", {}, r"attn_sub_norm\.weight \[32\]"),
        ("DiffLlama", {}, r"lambda_q1 \[8\] of transformers\.DiffLlamaAttention"),
        ("Cohere", {"use_qk_norm": True}, r"q_norm\.weight \[4, 8\]"),
        ("StableLm", {"qk_layernorm": True}, r"q_layernorm\.norms\.0\.weight \[8\]"),
    ],
)
def test_unknown_tensors_are_not_dealt(family, over, named):
    """Tensors laid out by heads in a way that `deal` does not know; the model stays as it was."""
    model, ids = banded(family, **over), tokens(1, 24)
    wanted = logits(model, ids)
    with pytest.raises(ValueError, match=REST.format(named)):
        spa.hf.deal(model, 2)
    assert torch.equal(logits(model, ids), wanted)


class Scaled(torch.nn.Linear):
    """A projection that computes something else."""


@pytest.mark.parametrize("when", ["before", "afterwards"])
def test_other_projections_are_not_dealt(when):
    model = banded("Llama")
    attention = model.model.layers[0].self_attn
    if when == "afterwards":
        spa.hf.deal(model, 2)
    attention.v_proj = Scaled(32, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"got v_proj of type test_hf_deal\.Scaled"):
        logits(model, tokens(1, 24)) if when == "afterwards" else spa.hf.deal(model, 2)


def test_models_with_adapters_are_not_dealt():
    """Wrapped projections, sinks of the adapter, and PEFT's layers without its model."""
    for model in (lora(banded("Llama"), "q_proj"), lora(banded("Llama", True), "gate_proj")):
        with pytest.raises(ValueError, match="`model` must have no adapters to deal its heads"):
            spa.hf.deal(model, 2)
    inner = lora(banded("Llama"), "q_proj").base_model.model
    del inner.peft_config
    with pytest.raises(ValueError, match=r"plain linear .* got q_proj of type lora\.Linear"):
        spa.hf.deal(inner, 2)
    inner = lora(banded("Llama", True), "gate_proj").base_model.model
    del inner.peft_config
    with pytest.raises(ValueError, match=REST.format(r"sinks\..*weight \[4\]")):
        spa.hf.deal(inner, 2)


def test_merged_adapters_are_dealt():
    model, ids = lora(banded("Llama", True), "q_proj").merge_and_unload(), tokens(1, 24)
    wanted = logits(model, ids)
    torch.testing.assert_close(logits(spa.hf.deal(model, 2), ids), wanted, rtol=0, atol=1e-10)


def test_dealt_models_get_no_adapters():
    """An adapter is saved in the order that it was trained in, and nothing in it says which."""
    model, ids = spa.hf.deal(banded("Llama"), 2), tokens(1, 24)
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    for give in (
        lambda: lora(model, "q_proj"),
        lambda: get_peft_model(model, prefix),
        lambda: model.add_adapter(LoraConfig(target_modules=["q_proj"])),
    ):
        with pytest.raises(ValueError, match="natural order to be given an adapter"):
            give()
    wanted = logits(model, ids)
    adapted = get_peft_model(spa.hf.deal(model, 1), LoraConfig(target_modules=["q_proj"])).eval()
    torch.testing.assert_close(logits(adapted, ids), wanted, rtol=0, atol=1e-10)


def test_dealt_models_get_no_other_bands():
    """Bands are in the order of the config, weights of a dealt model are not."""
    model = spa.hf.deal(banded("Llama"), 2)
    with pytest.raises(ValueError, match="natural order to be given bands"):
        spa.hf.apply(model, UNEQUAL)
    spa.hf.apply(spa.hf.deal(model, 1), UNEQUAL)


def test_shared_keys_are_not_dealt():
    model = banded("Llama")
    model.model.layers[0].self_attn.is_kv_shared_layer = True
    with pytest.raises(ValueError, match="`model` must have keys and values of its own"):
        spa.hf.deal(model, 2)
