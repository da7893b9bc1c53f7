"""Saved models come back with their bands and sinks, in a fresh process, or not at all."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import transformers
from tiny import EXACT, FIRST, HEADS, SECOND, banded, build, logits, tokens

import spattention as spa

LOAD = """
import sys
import torch, transformers
if sys.argv[1] == "register":
    import spattention as spa
    spa.hf.register()
for path in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    if model.config.model_type == "olmoe":
        model.set_experts_implementation("eager")
    ids = torch.load(path + "/ids.pt")
    torch.save(model(ids).logits, path + "/found.pt")
"""
# What people try in a process that has never imported the library.
FORGET = """
import shutil, sys
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

folder, fresh = sys.argv[1:]
config = AutoConfig.from_pretrained(folder)
config.save_pretrained(fresh)
shutil.copy(folder + "/model.safetensors", fresh)
dense = {"attn_implementation": "sdpa", "experts_implementation": "eager"}
ways = {
    "plain": lambda: AutoModelForCausalLM.from_pretrained(folder),
    "sdpa": lambda: AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa"),
    "dense": lambda: AutoModelForCausalLM.from_pretrained(folder, **dense),
    "base": lambda: AutoModel.from_pretrained(folder, **dense),
    "class": lambda: transformers.LlamaForCausalLM.from_pretrained(folder, **dense),
    "config": lambda: AutoModelForCausalLM.from_pretrained(folder, config=config, **dense),
    "pipeline": lambda: transformers.pipeline("text-generation", folder, model_kwargs=dense),
    "saved again": lambda: AutoModelForCausalLM.from_pretrained(fresh, **dense),
}
for name, way in ways.items():
    try:
        way()
        print(name, "opened")
    except Exception as error:
        print(name, str(error).replace("\\n", " "))
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


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
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
    result = run(LOAD, "register", *map(str, saved.values()))
    assert result.returncode == 0, result.stdout + result.stderr
    for path in saved.values():
        close = torch.testing.assert_close
        close(torch.load(path / "found.pt"), torch.load(path / "wanted.pt"), **EXACT)
        for entry in ("config.json", "again/config.json"):
            config = json.loads((path / entry).read_text())
            assert config["attn_implementation"] == "spattention"
            assert config["spattention"]["version"] == 1


def test_a_process_without_the_library_fails(saved, tmp_path):
    """It reads what to call, dense attention asked for or not, and "sdpa" is offered nowhere."""
    result = run(FORGET, str(saved["llama"]), str(tmp_path))
    lines = result.stdout.splitlines()
    assert len(lines) == 8, result.stderr
    for line in lines:
        assert "spattention.hf.register() must be called before this model is loaded" in line
        assert "sdpa" not in line.removeprefix("sdpa ").split("See the original errors")[0]


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


MARKED = {
    "architectures": ["SpattentionLlamaForCausalLM"],
    "attn_implementation": "spattention",
    "auto_map": {},
    "fusion_config": {
        "spattention: spattention.hf.register() must be called before this model is loaded": False
    },
    "model_type": "llama",
}


def check_marks(folder):
    config = config_of(folder)
    assert {name: config[name] for name in MARKED} == MARKED
    assert config["spattention"]["version"] == 1


def test_every_way_of_saving_marks_the_folder(tmp_path):
    model = banded("llama", sinks=True)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    model.save_pretrained(tmp_path / "weights", state_dict=model.state_dict())
    model.config.save_pretrained(tmp_path / "config")
    transformers.AutoConfig.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "copy")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    again.save_pretrained(tmp_path / "again")
    settings = transformers.TrainingArguments(tmp_path / "run", use_cpu=True, report_to=[])
    transformers.Trainer(again, settings).save_model()
    model.set_attn_implementation("sdpa")  # dense in this process alone
    model.save_pretrained(tmp_path / "dense")
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert len(folders) == 8
    for name in folders:
        check_marks(tmp_path / name)


def test_other_models_are_saved_as_ever(tmp_path):
    """Also one that was opened dense on purpose, and one whose config lost its section."""
    spa.hf.register()
    build("llama").save_pretrained(tmp_path / "dense")
    banded("llama").save_pretrained(tmp_path / "banded")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "banded")
    del config.spattention
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "banded", config=config, attn_implementation="sdpa"
    )
    model.save_pretrained(tmp_path / "again")
    config.save_pretrained(tmp_path / "config")
    for name in ("dense", "again", "config"):
        saved = config_of(tmp_path / name)
        assert saved["architectures"] == ["LlamaForCausalLM"]
        assert not {"attn_implementation", "fusion_config", "spattention"} & set(saved)


def test_a_fusion_of_the_model_is_kept(tmp_path):
    model = banded("llama")
    model.config.fusion_config = {"patch_embeddings": False}
    model.save_pretrained(tmp_path)
    assert config_of(tmp_path)["fusion_config"] == {
        "patch_embeddings": False,
        **MARKED["fusion_config"],
    }
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.model.layers[1].self_attn.spattention.pattern == SECOND


def test_old_folders_load(saved, tmp_path):
    """Saved before the marks were written: the section and the name of the attention alone."""
    for file in saved["llama"].glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = config_of(tmp_path)
    del config["fusion_config"]
    config["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    spa.hf.register()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.load(tmp_path / "ids.pt")
    torch.testing.assert_close(logits(model, ids), torch.load(tmp_path / "wanted.pt"), **EXACT)
    model.save_pretrained(tmp_path)
    check_marks(tmp_path)


def test_a_name_that_is_taken_is_refused():
    code = (
        "from transformers import AttentionInterface as I; import spattention as spa;"
        "I.register('spattention', print); spa.hf.register()"
    )
    result = run(code)
    assert 'attn_implementation="spattention" must not be registered by something' in result.stderr


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


def test_a_saved_model_takes_no_other_attention(saved):
    """A saved model is not loaded with another attention."""
    spa.hf.register()
    with pytest.raises(ValueError, match='must be "spattention" for a model with'):
        transformers.AutoModelForCausalLM.from_pretrained(
            saved["llama"], attn_implementation="sdpa"
        )


def test_a_choice_of_none_leaves_the_bands(saved):
    """Command lines such as `trl sft` pass `attn_implementation=None` on."""
    spa.hf.register()
    folder = saved["llama"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=None)
    again = transformers.AutoModelForCausalLM.from_config(model.config, attn_implementation=None)
    plain = transformers.AutoConfig.from_pretrained(folder, attn_implementation=None)
    built = transformers.LlamaForCausalLM(plain)
    for each in (model, again, built):
        assert each.model.layers[1].self_attn.spattention.pattern == SECOND
        assert each.config._attn_implementation == "spattention"


def test_a_config_with_the_section_builds_a_model():
    """A model can be built from a config with the section."""
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


def test_the_state_dict_needs_the_same_bands():
    """The state dict loads into a model with the same bands."""
    model, other = banded("llama", sinks=True), banded("llama", sinks=True, seed=1)
    fill_sinks(model)
    other.load_state_dict(model.state_dict())
    ids = tokens(1, 9)
    assert torch.equal(logits(other, ids), logits(model, ids))


def test_bands_can_be_applied_under_lora():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    model = peft.get_peft_model(build("llama"), settings)
    spa.hf.apply(model, (FIRST, SECOND))
    ids = tokens(1, 9)
    torch.testing.assert_close(logits(model, ids), logits(banded("llama"), ids), **EXACT)


LOAD_WEIGHTS = """
import sys
import torch
from transformers import AutoModelForCausalLM

if sys.argv[1] == "register":
    import spattention as spa
    spa.hf.register()
weights_only = sys.argv[1] != "pickle"
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
model.load_state_dict(torch.load(sys.argv[3], weights_only=weights_only))
"""


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("plain", "GLOBAL spattention.hf.weights.call_register_before_loading"),
        ("pickle", "spattention.hf.register() must be called before these weights are loaded"),
        ("register", "must be loaded into a model with the `config.spattention` that its weights"),
    ],
)
def test_weights_alone_need_their_bands(mode, message, tmp_path):
    build("llama").save_pretrained(tmp_path)
    torch.save(banded("llama").state_dict(), tmp_path / "weights.pt")
    result = run(LOAD_WEIGHTS, mode, str(tmp_path), str(tmp_path / "weights.pt"))
    assert result.returncode != 0
    assert message in result.stderr


def test_weights_alone_load_into_the_same_bands(tmp_path):
    model, ids = banded("llama", (FIRST, None), sinks=True), tokens(1, 9)
    fill_sinks(model)
    torch.save(copy.deepcopy(model.state_dict()), tmp_path / "weights.pt")
    weights = torch.load(tmp_path / "weights.pt")
    assert weights.keys() == model.state_dict().keys()
    same = banded("llama", (FIRST, None), sinks=True, seed=1)
    same.load_state_dict(weights)
    assert torch.equal(logits(same, ids), logits(model, ids))
    for other in (banded("llama", (SECOND, None), sinks=True), build("llama")):
        with pytest.raises(ValueError, match=r"`state_dict` must be loaded into a model with the"):
            other.load_state_dict(weights, strict=False)


def test_weights_in_memory_go_anywhere():
    """To compare a model with bands and a dense one, for instance."""
    model, stock, ids = banded("llama", seed=1), build("llama"), tokens(1, 9)
    stock.load_state_dict(model.state_dict())
    assert torch.equal(logits(stock, ids), logits(build("llama", seed=1), ids))
    model.load_state_dict(build("llama").state_dict())
    assert torch.equal(logits(model, ids), logits(banded("llama"), ids))
