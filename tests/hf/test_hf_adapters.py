"""PEFT adapters of models with bands: bands and sinks are trained, saved, switched and merged."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import safetensors.torch
import torch
import transformers
from adapted import (
    CONFIGS,
    IDS,
    PATTERNS,
    TARGETS,
    banded,
    base,
    dense,
    folder_of,
    peft,
    saved,
    train,
)
from tiny import EXACT, FIRST, HEADS, SPAN, logits, tokens

import spattention as spa
from spattention import baselines

__all__ = ["base", "saved"]  # fixtures


def test_files_of_an_adapter(saved, base):
    for sinks in (True, False):
        path = folder_of(saved, "lora", sinks)
        config = json.loads((path / "adapter_config.json").read_text())
        assert config["peft_type"].startswith("LORA (spattention: spattention.hf.register() must")
        assert config["spattention"] == banded(base, sinks).config.spattention
        assert config["modules_to_save"] == ["spattention"]
        weights = safetensors.torch.load_file(path / "adapter_model.safetensors")
        names = [f"base_model.model.model.layers.{i}.self_attn.sinks.weight" for i in (0, 1)]
        assert [name for name in weights if "sinks" in name] == (names if sinks else [])
    both = folder_of(saved, "no_task") / "adapter_config.json"
    assert json.loads(both.read_text())["modules_to_save"] == ["lm_head", "spattention"]


@pytest.mark.parametrize("kind", CONFIGS)
def test_sinks_are_trained_with_adapters(kind, base):
    model = peft.get_peft_model(banded(base), CONFIGS[kind]())
    train(model)
    sinks = [p for name, p in model.named_parameters() if "sinks" in name and p.requires_grad]
    assert len(sinks) == 2
    assert all(bool((p != 0).all()) for p in sinks)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_disabled_adapter_leaves_the_base(kind, base):
    model = peft.get_peft_model(banded(base), CONFIGS[kind]())
    trained = train(model)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, IDS), logits(banded(base), IDS), **EXACT)
    torch.testing.assert_close(logits(model, IDS), trained, **EXACT)


@pytest.mark.parametrize("kind", ["lora", "dora", "no_task", "ia3"])
def test_a_merged_adapter_is_saved_whole(kind, base, tmp_path):
    model = peft.get_peft_model(banded(base), CONFIGS[kind]())
    wanted = train(model)
    merged = model.merge_and_unload()
    names = [name for name, _ in merged.named_parameters() if "sinks" in name]
    assert names == [f"model.layers.{i}.self_attn.sinks" for i in (0, 1)]
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(dense(tmp_path), IDS), wanted, **EXACT)


def test_an_unloaded_adapter_leaves_the_base(base):
    """PEFT keeps what was trained beside its layers; half of an adapter is nobody's model."""
    wanted = logits(banded(base), IDS)
    model = peft.get_peft_model(banded(base), CONFIGS["lora"]())
    train(model)
    assert torch.equal(logits(model.unload(), IDS), wanted)


def test_the_sinks_of_a_merged_adapter_are_merged(base):
    """Those of the adapter that is named, not of the active one."""
    model = peft.get_peft_model(banded(base), CONFIGS["lora"]())
    train(model)
    model.add_adapter("other", CONFIGS["lora"]())
    model.set_adapter("other")
    wanted = train(model)
    model.set_adapter("default")
    both = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"must be the active adapter .* got \['other'\]"):
        both.merge_adapter(adapter_names=["other"])
    merged = model.merge_and_unload(adapter_names=["other"])
    torch.testing.assert_close(logits(merged, IDS), wanted, **EXACT)
    with pytest.raises(ValueError, match=r"must name one adapter .* got \['default', 'other'\]"):
        both.merge_and_unload(adapter_names=["default", "other"])


def test_adapters_of_transformers_are_enabled_again(base):
    """Transformers enables only a part of what it disables."""
    model, plain = banded(base), logits(banded(base), IDS)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=TARGETS))
    wanted = train(model)
    model.disable_adapters()
    assert torch.equal(logits(model, IDS), plain)
    model.enable_adapters()
    assert torch.equal(logits(model, IDS), wanted)


def test_an_adapter_of_a_saved_model(base, tmp_path):
    """Its base is the folder with bands, whose sinks are not zero."""
    first = banded(base)
    with torch.no_grad():
        for layer in first.model.layers:
            layer.self_attn.sinks.fill_(0.7)
    first.save_pretrained(tmp_path / "banded")
    model = peft.get_peft_model(dense(tmp_path / "banded"), CONFIGS["lora"]())
    wanted = train(model)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(again, IDS), wanted, **EXACT)
    with again.disable_adapter():
        torch.testing.assert_close(logits(again, IDS), logits(first, IDS), **EXACT)


def test_each_adapter_has_its_sinks(saved, base):
    one, other = folder_of(saved, "lora"), folder_of(saved, "dora")
    model = peft.PeftModel.from_pretrained(dense(base), one, adapter_name="one")
    model.load_adapter(other, "other")
    for name, path in (("one", one), ("other", other), ("one", one)):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model, IDS), saved[path][1], **EXACT)
    model.delete_adapter("one")
    model.set_adapter("other")
    torch.testing.assert_close(logits(model, IDS), saved[other][1], **EXACT)


def test_sinks_do_not_differ_by_row(saved, base):
    path = folder_of(saved, "lora")
    model = peft.PeftModel.from_pretrained(dense(base), path, adapter_name="one")
    model.load_adapter(path, "two")
    with pytest.raises(ValueError, match="`adapter_names` must be None for a model with sinks"):
        model(IDS, adapter_names=["one", "two"])


def test_several_adapters_are_saved(base, tmp_path):
    model = peft.get_peft_model(banded(base), CONFIGS["lora"](), adapter_name="one")
    model.add_adapter("two", CONFIGS["lora"]())
    wanted = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        wanted[name] = train(model, tokens(2, 20, seed=len(wanted)))
    model.save_pretrained(tmp_path)
    for name in wanted:
        model.set_adapter(name)
        again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / name)
        torch.testing.assert_close(logits(again, IDS), logits(model, IDS), **EXACT)


def test_hot_swapping_asks_for_the_same_bands(saved, base):
    from peft.utils.hotswap import hotswap_adapter

    path = folder_of(saved, "lora", sinks=False)
    model = peft.PeftModel.from_pretrained(dense(base), path, is_trainable=True)
    train(model)
    hotswap_adapter(model, path, adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(logits(model, IDS), saved[path][1], **EXACT)
    plain = peft.get_peft_model(dense(base), CONFIGS["lora"]())
    with pytest.raises(ValueError, match=r"the `config\.spattention` .*, got one without"):
        hotswap_adapter(plain, path, adapter_name="default", torch_device="cpu")
    path = folder_of(saved, "lora")
    model = peft.PeftModel.from_pretrained(dense(base), path)
    with pytest.raises(ValueError, match="an adapter with sinks must not be hot-swapped"):
        hotswap_adapter(model, path, adapter_name="default", torch_device="cpu")


def old_adapter(base, path):
    """An adapter as it was saved before it carried its section."""
    model = peft.get_peft_model(banded(base), CONFIGS["lora"]())
    train(model)
    model.save_pretrained(path)
    config = json.loads((path / "adapter_config.json").read_text())
    del config["spattention"]
    config |= {"peft_type": "LORA", "modules_to_save": None}
    (path / "adapter_config.json").write_text(json.dumps(config))
    weights = safetensors.torch.load_file(path / "adapter_model.safetensors")
    weights = {name: weight for name, weight in weights.items() if "sinks" not in name}
    safetensors.torch.save_file(weights, path / "adapter_model.safetensors", {"format": "pt"})


def test_old_adapters_load_into_bands(base, tmp_path):
    """The bands of their base are applied before, as they were; their sinks are the base's."""
    old_adapter(base, tmp_path)
    on_bands = peft.PeftModel.from_pretrained(banded(base), tmp_path)
    bare = peft.PeftModel.from_pretrained(banded(base, sinks=False), tmp_path)
    weights = on_bands.state_dict()
    assert all(bool((p == 0).all()) for name, p in weights.items() if "sinks" in name)
    for name, weight in bare.state_dict().items():
        assert torch.equal(weight, weights[name])
    resumed = peft.get_peft_model(banded(base), CONFIGS["lora"]())
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    torch.testing.assert_close(logits(resumed.eval(), IDS), logits(on_bands, IDS), **EXACT)


def test_an_adapter_of_a_dense_model_is_as_before(base, tmp_path):
    model = peft.get_peft_model(dense(base), CONFIGS["lora"]())
    wanted = train(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["modules_to_save"] is None
    assert "spattention" not in config
    again = peft.PeftModel.from_pretrained(dense(base), tmp_path)
    torch.testing.assert_close(logits(again, IDS), wanted, **EXACT)


def test_one_config_for_two_models(base, tmp_path):
    """A config that was used with bands puts none into a dense model afterwards."""
    config = CONFIGS["lora"]()
    peft.get_peft_model(banded(base), config)
    model = peft.get_peft_model(dense(base), config)
    assert model.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    assert "spattention" not in (tmp_path / "adapter_config.json").read_text()


def test_a_config_that_is_saved_again_keeps_bands(saved, base, tmp_path):
    """Changed by hand, with the weights beside it."""
    source = folder_of(saved, "lora")
    config = peft.PeftConfig.from_pretrained(source)
    config.inference_mode = False
    config.save_pretrained(tmp_path)
    name = "adapter_model.safetensors"
    (tmp_path / name).write_bytes((source / name).read_bytes())
    again = peft.PeftModel.from_pretrained(dense(base), tmp_path)
    torch.testing.assert_close(logits(again, IDS), saved[source][1], **EXACT)


def test_an_adapter_converted_to_lora_keeps_bands(base, tmp_path):
    settings = peft.LoKrConfig(r=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(banded(base), settings)
    train(model)
    peft.save_as_lora(tmp_path, model, rank=16)  # of 16 and 32 outputs: nearly exact
    again = peft.PeftModel.from_pretrained(dense(base), tmp_path)
    sinks = [layer.self_attn.sinks() for layer in model.base_model.model.model.layers]
    found = [layer.self_attn.sinks() for layer in again.base_model.model.model.layers]
    assert [torch.equal(*pair) for pair in zip(found, sinks)] == [True, True]
    assert [bool((each != 0).all()) for each in found] == [True, True]


def test_bands_applied_under_an_adapter_are_saved(base, tmp_path):
    model = peft.get_peft_model(dense(base), CONFIGS["lora"]())
    spa.hf.apply(model, PATTERNS, sinks=True)
    wanted = train(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(dense(base), tmp_path)
    torch.testing.assert_close(logits(again, IDS), wanted, **EXACT)
    spa.hf.apply(model, FIRST)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(dense(base), tmp_path)
    torch.testing.assert_close(logits(again, IDS), logits(model, IDS), **EXACT)
    assert not any("sinks" in name for name, _ in model.named_parameters())


def test_adapters_of_transformers_are_saved(base, tmp_path):
    model = banded(base)
    model.add_adapter(CONFIGS["lora"]())
    wanted = train(model)
    model.save_pretrained(tmp_path)
    again = dense(base)
    again.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(again, IDS), wanted, **EXACT)


@pytest.mark.slow
def test_trainer_resumes_an_adapter(base, tmp_path):
    """On bands, and on a dense model, which gets the bands of the checkpoint."""
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 20)]

    def trainer(model, steps, folder):
        settings = transformers.TrainingArguments(
            folder, max_steps=steps, save_steps=2, per_device_train_batch_size=2, report_to=[],
            use_cpu=True, disable_tqdm=True, learning_rate=1e-2, lr_scheduler_type="constant",
        )  # fmt: skip
        return transformers.Trainer(model, settings, train_dataset=rows)

    whole = peft.get_peft_model(banded(base), CONFIGS["lora"]())
    trainer(whole, 4, tmp_path).train()
    for start in (banded(base), dense(base)):
        model = peft.get_peft_model(start, CONFIGS["lora"]())
        again = trainer(model, 4, tmp_path / "again")
        again.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
        torch.testing.assert_close(logits(model, IDS), logits(whole, IDS), **EXACT)


def test_a_model_with_an_adapter_is_copied(saved, base):
    path = folder_of(saved, "lora")
    model = peft.PeftModel.from_pretrained(dense(base), path)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(logits(again, IDS), saved[path][1], **EXACT)


def test_adapters_on_bands_compile(base):
    torch._dynamo.reset()
    model = peft.get_peft_model(banded(base), CONFIGS["lora"]())
    wanted = train(model)
    with torch.no_grad():
        found = torch.compile(model, backend="eager", fullgraph=True)(IDS, use_cache=False).logits
    torch.testing.assert_close(found, wanted, **EXACT)


def test_an_adapter_of_a_baseline_brings_it_back(base, tmp_path):
    chosen = baselines.BigBird(HEADS, SPAN, block=4, window=2, global_blocks=1, random=2)
    model = peft.get_peft_model(baselines.apply(dense(base), chosen), CONFIGS["lora"]())
    wanted = train(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "(bigbird: spattention.baselines.register() must be called" in config["peft_type"]
    again = peft.PeftModel.from_pretrained(dense(base), tmp_path)
    torch.testing.assert_close(logits(again, IDS), wanted, **EXACT)
    with pytest.raises(ValueError, match=r"with the `config.bigbird` that it was"):
        peft.PeftModel.from_pretrained(banded(base), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sinks_of_half_models_are_trained(base, tmp_path, dtype):
    """Steps of training are smaller than the distance of such numbers, and would be lost."""

    def half():
        return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)

    model = peft.get_peft_model(spa.hf.apply(half(), PATTERNS, sinks=6.0), CONFIGS["lora"]())
    sinks = {name: p for name, p in model.named_parameters() if "sinks" in name and p.requires_grad}
    assert len(sinks) == 2
    optimizer = torch.optim.AdamW(sinks.values(), lr=1e-4, weight_decay=0.0)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    for weight in sinks.values():
        assert weight.dtype == torch.float32
        assert (weight != 6).all()
    wanted = logits(model.eval(), IDS)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(half(), tmp_path)
    assert torch.equal(logits(again, IDS), wanted)
    late = half()
    late.load_adapter(str(tmp_path))
    assert torch.equal(logits(late, IDS), wanted)
    merged = again.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {dtype}
