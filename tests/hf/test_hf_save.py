"""Saved models come back with their bands and sinks, in a fresh process, or not at all."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import transformers
from tiny import EXACT, FIRST, HEADS, SECOND, banded, logits, tokens

import spattention as spa

LOAD = """
import sys
import torch, transformers
if sys.argv[1] == "register":
    import spattention as spa
    spa.hf.register()
failed = 0
for path in sys.argv[2:]:
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    except ValueError as error:
        print(path, error)
        failed += 1
        continue
    if model.config.model_type == "olmoe":
        model.set_experts_implementation("eager")
    ids = torch.load(path + "/ids.pt")
    torch.save(model(ids).logits, path + "/found.pt")
sys.exit(failed)
"""
CASES = {
    "olmoe": ((FIRST, SECOND), True),
    "llama": ((None, SECOND), True),
    "gpt_neox": ((FIRST, None), False),
}


def fill_sinks(model):
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if name.endswith(".sinks"):
                parameter.copy_(torch.arange(HEADS) / 2 - index / 7)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LOAD, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    paths = {}
    for family, (pattern, sinks) in CASES.items():
        path = tmp_path_factory.mktemp(family)
        model = banded(family, pattern, sinks=sinks)
        fill_sinks(model)
        ids = tokens(1, 15)
        model.save_pretrained(path)
        torch.save(ids, path / "ids.pt")
        torch.save(logits(model, ids), path / "wanted.pt")
        again = transformers.AutoModelForCausalLM.from_pretrained(path)
        again.save_pretrained(path / "again")
        paths[family] = path
    return paths


def test_saved_models_come_back_in_a_fresh_process(saved):
    result = run("register", *map(str, saved.values()))
    assert result.returncode == 0, result.stdout + result.stderr
    for path in saved.values():
        close = torch.testing.assert_close
        close(torch.load(path / "found.pt"), torch.load(path / "wanted.pt"), **EXACT)
        for entry in ("config.json", "again/config.json"):
            config = json.loads((path / entry).read_text())
            assert config["attn_implementation"] == "spattention"
            assert config["spattention"]["version"] == 1


def test_a_process_that_did_not_register_cannot_load(saved):
    paths = [saved["olmoe"], saved["llama"], saved["llama"] / "again"]
    result = run("forget", *map(str, paths))
    assert result.returncode == len(paths), result.stderr
    assert result.stdout.count('attn_implementation="spattention"` is not supported') == len(paths)


def test_sinks_are_loaded_strictly(saved, tmp_path):
    spa.hf.register()
    for file in saved["llama"].glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    weights = safetensors.torch.load_file(saved["llama"] / "model.safetensors")
    names = [name for name in weights if name.endswith(".sinks")]
    assert names == ["model.layers.1.self_attn.sinks"]
    extra = {**weights, "model.layers.0.self_attn.sinks": torch.zeros(HEADS)}
    less = {name: weight for name, weight in weights.items() if name not in names}
    for entries, message in (
        (less, r"must hold the sinks .* got no model\.layers\.1\.self_attn\.sinks"),
        (extra, r"must name the sinks .* got model\.layers\.0\.self_attn\.sinks"),
    ):
        safetensors.torch.save_file(entries, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_saved_model_is_not_loaded_with_another_attention(saved):
    spa.hf.register()
    with pytest.raises(ValueError, match='must be "spattention" for a model with'):
        transformers.AutoModelForCausalLM.from_pretrained(
            saved["llama"], attn_implementation="sdpa"
        )


def test_a_model_can_be_built_from_a_config_with_the_section():
    config = banded("llama", sinks=True).config
    fresh = type(config)(**json.loads(config.to_json_string()))
    model = transformers.AutoModelForCausalLM.from_config(fresh)
    for layer, pattern in zip(model.model.layers, (FIRST, SECOND)):
        assert layer.self_attn.spattention.pattern == pattern
        assert layer.self_attn.sinks.tolist() == [0.0] * HEADS


def test_a_model_can_be_pickled():
    model = banded("llama")
    ids = tokens(1, 9)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), ids), logits(model, ids))


def test_the_state_dict_loads_into_a_model_with_the_same_bands():
    model, other = banded("llama", sinks=True), banded("llama", sinks=True, seed=1)
    fill_sinks(model)
    other.load_state_dict(model.state_dict())
    ids = tokens(1, 9)
    assert torch.equal(logits(other, ids), logits(model, ids))


def test_lora_trains_on_top_and_is_saved(tmp_path):
    peft = pytest.importorskip("peft")
    base = banded("llama", sinks=True)
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, settings)
    ids = tokens(2, 12)
    model.train()
    model(ids, labels=ids).loss.backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained
    assert all("lora" in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    model.eval()
    wanted = logits(model, ids)
    assert (wanted - logits(banded("llama", sinks=True), ids)).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(banded("llama", sinks=True), tmp_path).double()
    torch.testing.assert_close(logits(again, ids), wanted, **EXACT)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), wanted, **EXACT)
    generated = merged.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 15)


def test_bands_can_be_applied_under_lora():
    peft = pytest.importorskip("peft")
    from tiny import build

    settings = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    model = peft.get_peft_model(build("llama"), settings)
    spa.hf.apply(model, (FIRST, SECOND))
    ids = tokens(1, 9)
    torch.testing.assert_close(logits(model, ids), logits(banded("llama"), ids), **EXACT)
