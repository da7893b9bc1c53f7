"""Sinks are made where a model runs and in what it computes, whatever its weights are stored as."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny import EXACT, FIRST, HEADS, SECOND, banded, build, logits, tokens

import spattention as spa

accelerate = pytest.importorskip("accelerate")

IDS = tokens(2, 15)


def set_sinks(model):
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.sinks.copy_(torch.arange(HEADS) / 3 + index)
    return model


def offloaded(how, folder):
    model = build("llama")
    if how == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif how == "disk":
        accelerate.disk_offload(model, folder, execution_device="cpu")
    else:  # the second layer waits on the disk
        model.save_pretrained(folder / "model")
        places = dict.fromkeys(
            ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"),
            "cpu",
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "model",
            device_map={**places, "model.layers.1": "disk"},
            offload_folder=folder / "offload",
        )
    return model


@pytest.mark.parametrize("how", ["cpu", "disk", "device_map"])
def test_offloaded_models_get_real_sinks(how, tmp_path):
    model = spa.hf.apply(offloaded(how, tmp_path), (FIRST, SECOND), sinks=True)
    assert {layer.self_attn.sinks.device.type for layer in model.model.layers} == {"cpu"}
    set_sinks(model)
    wanted = logits(set_sinks(banded("llama", sinks=True)), IDS)
    torch.testing.assert_close(logits(model, IDS), wanted, **EXACT)
    if how == "device_map":  # Transformers saves no others
        model.save_pretrained(tmp_path / "saved")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        torch.testing.assert_close(logits(again, IDS), wanted, **EXACT)


def test_saved_sinks_can_be_offloaded(tmp_path):
    model = set_sinks(banded("llama", sinks=True))
    model.save_pretrained(tmp_path)
    places = {"model": "disk", "lm_head": "cpu"}
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=places, offload_folder=tmp_path / "offload"
    )
    assert again.model.layers[0].self_attn.sinks.device.type == "meta"  # until it runs
    torch.testing.assert_close(logits(again, IDS), logits(model, IDS), **EXACT)


@pytest.mark.parametrize(
    ("stored", "config", "wanted"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float8_e4m3fn, torch.bfloat16, torch.bfloat16),
        (torch.float8_e5m2, None, torch.float32),
        (torch.int8, torch.float16, torch.float16),
        (torch.uint8, torch.float8_e4m3fn, torch.float32),
    ],
)
def test_sinks_have_a_dtype_to_compute_in(stored, config, wanted):
    model = build("llama")
    for layer in model.model.layers:
        for child in layer.self_attn.children():
            child.weight = torch.nn.Parameter(child.weight.data.to(stored), requires_grad=False)
    model.config.dtype = config
    spa.hf.apply(model, FIRST, sinks=True)
    for layer in model.model.layers:
        assert layer.self_attn.sinks.dtype == wanted
        assert layer.self_attn.sinks.requires_grad


def test_sinks_of_an_empty_model_start_at_zero(tmp_path):
    """Applied before the weights are there: a dense checkpoint has no sinks to load."""
    stock = build("llama")
    stock.save_pretrained(tmp_path)
    with accelerate.init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(stock.config)
    spa.hf.apply(model, (FIRST, SECOND), sinks=True)
    accelerate.load_checkpoint_in_model(model, tmp_path)
    model.tie_weights()
    model.model.rotary_emb = stock.model.rotary_emb
    wanted = logits(banded("llama", sinks=True), IDS)
    torch.testing.assert_close(logits(model.double(), IDS), wanted, **EXACT)


def test_an_empty_model_with_sinks_is_filled():
    """Built with sinks on the meta device, then given the weights of another."""
    model = set_sinks(banded("llama", sinks=True))
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(model.config)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.model.rotary_emb = model.model.rotary_emb
    torch.testing.assert_close(logits(empty.eval(), IDS), logits(model, IDS), **EXACT)


@pytest.mark.parametrize("sinks", [70000.0, -70000.0, 1e39, 10**400, float("nan")])
def test_sinks_that_no_dtype_holds_are_refused(sinks):
    """Half precision would make them infinite, and the logits NaN."""
    with pytest.raises(ValueError, match="`sinks` must be from -65504 to 65504"):
        spa.hf.apply(build("llama"), FIRST, sinks=sinks)


def test_sinks_start_from_the_values_given():
    """From one tensor per layer, or one number; True keeps what is there."""
    values = [torch.arange(HEADS) / 3 + layer for layer in range(2)]
    model = spa.hf.apply(build("llama"), (FIRST, SECOND), sinks=values)
    wanted = logits(set_sinks(banded("llama", sinks=True)), IDS)
    torch.testing.assert_close(logits(model, IDS), wanted, **EXACT)
    again = spa.hf.apply(model, (FIRST, SECOND), sinks=True)
    torch.testing.assert_close(logits(again, IDS), wanted, **EXACT)
    spa.hf.apply(model, (FIRST, SECOND), sinks=-1.5)
    for layer in model.model.layers:
        assert layer.self_attn.sinks.tolist() == [-1.5] * HEADS
        assert layer.self_attn.sinks.requires_grad
    partly = spa.hf.apply(build("llama"), (None, SECOND), sinks=[None, values[1]])
    assert partly.model.layers[1].self_attn.sinks.tolist() == pytest.approx(values[1].tolist())
    assert not hasattr(partly.model.layers[0].self_attn, "sinks")


def test_layers_may_be_an_iterator():
    """Its indices are read once, for the pattern and for the values of the sinks."""
    model = spa.hf.apply(build("llama"), FIRST, layers=iter([1]), sinks=0.5)
    assert model.model.layers[1].self_attn.sinks.tolist() == [0.5] * HEADS
