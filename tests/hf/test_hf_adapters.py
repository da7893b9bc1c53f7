"""PEFT adapters of models with bands: they come back with bands and sinks, or not at all."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import transformers
from tiny import EXACT, FIRST, HEADS, SECOND, SPAN, P, build, logits, tokens

import spattention as spa
from spattention import baselines

peft = pytest.importorskip("peft")

PATTERNS = [FIRST, SECOND]
IDS = tokens(2, 20)
TARGETS = ["q_proj", "v_proj"]
CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "dora": lambda: peft.LoraConfig(
        r=2, target_modules=TARGETS, task_type="CAUSAL_LM", use_dora=True
    ),
    "no_task": lambda: peft.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["lm_head"]),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}
# How people open an adapter: `folder` is the adapter's, `base` the dense model's.
WAYS = """
def dense():
    return transformers.AutoModelForCausalLM.from_pretrained(base)

def on_dense(**keywords):
    return peft.PeftModel.from_pretrained(dense(), folder, **keywords)

def transformers_adapter():
    model = dense()
    model.load_adapter(folder)
    return model

def weights_alone():  # as Trainer does when it resumes
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(dense(), settings)
    model.load_adapter(folder, "default", is_trainable=True)
    return model

def auto():
    name = "AutoPeftModel" if "no_task" in folder else "AutoPeftModelForCausalLM"
    return getattr(peft, name).from_pretrained(folder)

ways = {
    "auto": auto,
    "on_dense": on_dense,
    "trainable": lambda: on_dense(is_trainable=True),
    "low_memory": lambda: on_dense(low_cpu_mem_usage=True),
    "renamed": lambda: on_dense(adapter_name="other"),
    "transformers_adapter": transformers_adapter,
    "transformers_auto": lambda: transformers.AutoModelForCausalLM.from_pretrained(folder),
    "weights_alone": weights_alone,
}
"""
OPEN = (
    """
import json, sys, warnings
import torch, transformers
warnings.simplefilter("ignore")
if sys.argv[1] == "register":
    import spattention
    spattention.hf.register()
import peft
ids = torch.load(sys.argv[2])
base = sys.argv[3]
found = {}
"""
    + WAYS
    + """
for order in sys.argv[4:]:
    folder, *names = order.split(",")
    for name in names:
        try:
            model = ways[name]().eval()
            found[f"{folder},{name}"] = model(ids).logits.detach()
        except Exception as error:
            found[f"{folder},{name}"] = f"{type(error).__name__}: {error}"
torch.save(found, sys.argv[2] + ".found")
"""
)
EVERY_WAY = (
    *("auto", "on_dense", "trainable", "low_memory", "renamed"),
    *("transformers_adapter", "transformers_auto", "weights_alone"),
)


def dense(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path)


def banded(path, sinks=True, pattern=PATTERNS):
    return spa.hf.apply(dense(path), pattern, sinks=sinks)


def train(model, ids=IDS):
    """A few steps, and the logits afterwards."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return logits(model.eval(), ids)


def open_in_new_process(mode, folder, base, orders):
    torch.save(IDS, folder / "ids.pt")
    command = [sys.executable, "-c", OPEN, mode, str(folder / "ids.pt"), str(base)]
    command += [",".join([str(path), *names]) for path, names in orders]
    subprocess.run(command, check=True, capture_output=True)
    return torch.load(folder / "ids.pt.found")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    build("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """Folders of adapters trained on bands, with sinks and without, and their logits."""
    found = {}
    for kind, config in CONFIGS.items():
        for sinks in (True, False):
            path = tmp_path_factory.mktemp(f"{kind}-{sinks}-")
            model = peft.get_peft_model(banded(base, sinks), config())
            found[path] = (kind, train(model))
            model.save_pretrained(path)
    return found


def folder_of(saved, kind, sinks=True):
    return next(path for path in saved if path.name.startswith(f"{kind}-{sinks}-"))


@pytest.mark.slow
def test_adapters_bring_their_bands_back(saved, base, tmp_path):
    """Opened on a dense base in a new process, in all ways that PEFT and Transformers have."""
    orders = [(path, ["auto"]) for path in saved]
    orders += [(folder_of(saved, "lora"), EVERY_WAY[1:])]
    orders += [(folder_of(saved, kind), ["on_dense"]) for kind in ("ia3", "prompt")]
    found = open_in_new_process("register", tmp_path, base, orders)
    assert len(found) == sum(len(names) for _, names in orders)
    for name, result in found.items():
        wanted = next(w for path, (_, w) in saved.items() if name.startswith(f"{path},"))
        assert isinstance(result, torch.Tensor), f"{name}: {result}"
        torch.testing.assert_close(result, wanted, **EXACT, msg=name)


def test_adapters_need_the_library(saved, base, tmp_path):
    """A process that never imported the library fails, and reads what to call."""
    ways = [way for way in EVERY_WAY if way != "weights_alone"]
    orders = [(folder_of(saved, "lora"), ways), (folder_of(saved, "lora", False), ["on_dense"])]
    orders += [(folder_of(saved, "prompt"), ["auto"])]
    for name, result in open_in_new_process("plain", tmp_path, base, orders).items():
        assert isinstance(result, str), name
        assert "spattention.hf.register() must be called" in result, result


def test_peft_is_guarded_when_it_is_imported():
    """Not before; whether PEFT is there is asked often, and does not count as an import."""
    code = (
        "import importlib.util, sys; import spattention as spa; spa.hf.register();"
        "assert importlib.util.find_spec('peft') and importlib.util.find_spec('peft');"
        "assert 'peft' not in sys.modules; import peft;"
        "assert hasattr(peft.PeftModel.load_adapter, '__wrapped__')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_old_version_of_peft_is_named(monkeypatch):
    spa.hf.register()
    monkeypatch.delitem(sys.modules, "spattention.hf.peft_guard")
    monkeypatch.setattr(peft, "__version__", "0.20.1")
    with pytest.raises(ImportError, match=r"needs PEFT 0\.21 or newer for adapters, got 0\.20\.1"):
        importlib.import_module("spattention.hf.peft_guard")


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


def test_an_adapter_on_other_bands_is_refused(saved, base):
    path = folder_of(saved, "lora")
    match = "must be loaded into a model with the `spattention` that it was trained with"
    for pattern, sinks in (([SECOND, FIRST], True), (PATTERNS, False)):
        with pytest.raises(ValueError, match=match):
            peft.PeftModel.from_pretrained(banded(base, sinks, pattern), path)
        with pytest.raises(ValueError, match=match):
            banded(base, sinks, pattern).load_adapter(str(path))
        model = peft.get_peft_model(banded(base, sinks, pattern), CONFIGS["lora"]())
        with pytest.raises(ValueError, match=match):
            model.load_adapter(path, "default")
        with pytest.raises(ValueError, match=match):
            model.load_adapter(path, "second")


def test_a_dense_model_with_adapters_is_not_changed(saved, base):
    model = peft.get_peft_model(dense(base), CONFIGS["lora"]())
    before = logits(model.eval(), IDS)
    with pytest.raises(ValueError, match=r"must have `config.spattention` before the adapter of"):
        model.load_adapter(folder_of(saved, "lora"), "second")
    assert torch.equal(logits(model, IDS), before)


def test_hot_swapping_asks_for_the_same_bands(saved, base):
    from peft.utils.hotswap import hotswap_adapter

    path = folder_of(saved, "lora", sinks=False)
    model = peft.PeftModel.from_pretrained(dense(base), path, is_trainable=True)
    train(model)
    hotswap_adapter(model, path, adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(logits(model, IDS), saved[path][1], **EXACT)
    plain = peft.get_peft_model(dense(base), CONFIGS["lora"]())
    with pytest.raises(ValueError, match=r"a model with `config\.spattention`, got one without"):
        hotswap_adapter(plain, path, adapter_name="default", torch_device="cpu")
    path = folder_of(saved, "lora")
    model = peft.PeftModel.from_pretrained(dense(base), path)
    with pytest.raises(ValueError, match="an adapter with sinks must not be hot-swapped"):
        hotswap_adapter(model, path, adapter_name="default", torch_device="cpu")


def test_an_adapter_without_its_sinks_is_refused(saved, base, tmp_path):
    for file in folder_of(saved, "lora").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    del weights["base_model.model.model.layers.1.self_attn.sinks.weight"]
    safetensors.torch.save_file(weights, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    match = r"must hold the sinks that its config names, got no .*layers\.1\.self_attn\.sinks"
    with pytest.raises(ValueError, match=match):
        peft.PeftModel.from_pretrained(dense(base), tmp_path)
    with pytest.raises(ValueError, match=match):
        dense(base).load_adapter(str(tmp_path))


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


def damage(text, **change):
    config = json.loads(text)
    for name, value in change.items():
        if value is None:
            del config[name]
        else:
            config[name] = value
    return json.dumps(config)


def section(**change):
    config = {"version": 1, "patterns": [FIRST.to_dict()], "layers": [0, 0], "sinks": True}
    return {**config, **change}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spattention": None}, "must be the section of the model .* got None"),
        ({"spattention": [1]}, r"must be the section of the model .* got \[1\]"),
        ({"spattention": section(version=2)}, "must have version 1 .* got 2"),
        ({"spattention": section(layers=[0])}, "one entry of `layers` per text layer, 2"),
        ({"spattention": section(sinks="yes")}, "must have a bool for `sinks`"),
        ({"spattention": section(patterns=[P.dense(3, 8).to_dict()])}, "has 3 heads but layer 0"),
        ({"spattention": section(patterns=[{"span": 2**63}])}, "`spattention` of"),
        (
            {"spattention": section(patterns=[P.dense(HEADS, 2**40).to_dict()])},
            "`span` of a pattern .* must be at most",
        ),
        ({"spattention": {"foreign": 1}}, "must have version 1"),
    ],
)
def test_a_damaged_adapter_config_is_refused(change, message, saved, base, tmp_path):
    for file in folder_of(saved, "lora").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "adapter_config.json"
    path.write_text(damage(path.read_text(), **change))
    with pytest.raises(ValueError, match=message):
        peft.PeftModel.from_pretrained(dense(base), tmp_path)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        dense(base).load_adapter(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", b"", r"adapter_config\.json must hold JSON"),
        ("adapter_config.json", b"{", r"adapter_config\.json must hold JSON"),
        ("adapter_config.json", b"\xff\xfe\x00", r"adapter_config\.json must hold JSON"),
        ("adapter_config.json", b"[1, 2]", r"must hold the config of an adapter, got list"),
        ("adapter_model.safetensors", b"\x08", "(?i)header"),
    ],
)
def test_a_damaged_adapter_file_is_refused(name, content, message, saved, base, tmp_path):
    for file in folder_of(saved, "lora").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_bytes(content)
    for way in (
        lambda: peft.PeftModel.from_pretrained(dense(base), str(tmp_path)),
        lambda: peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path)),
    ):
        with pytest.raises((ValueError, OSError, safetensors.SafetensorError), match=message):
            way()


def test_an_adapter_of_a_baseline_brings_it_back(base, tmp_path):
    chosen = baselines.BigBird(HEADS, SPAN, block=4, window=2, global_blocks=1, random=2)
    model = peft.get_peft_model(baselines.apply(dense(base), chosen), CONFIGS["lora"]())
    wanted = train(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "(bigbird: spattention.baselines.register() must be called" in config["peft_type"]
    again = peft.PeftModel.from_pretrained(dense(base), tmp_path)
    torch.testing.assert_close(logits(again, IDS), wanted, **EXACT)
    with pytest.raises(ValueError, match="must be loaded into a model with the `bigbird`"):
        peft.PeftModel.from_pretrained(banded(base), tmp_path)
