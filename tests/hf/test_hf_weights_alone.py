"""Weights, adapters and checkpoints of band models that are opened without their config."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import EXACT, FIRST, SECOND, banded, build, logits, tokens

import spattention as spa
from spattention import related
from spattention.baselines.adapter import remove
from spattention.hf.weights import MARK, mark_text

peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

CALL = "spattention.hf.register() must be called before this"
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
OPEN = """
import json, sys, warnings
import torch, transformers
warnings.simplefilter("ignore")
mode, folder = sys.argv[1:3]
if mode == "register":
    import spattention
    spattention.hf.register()
import accelerate, peft
from safetensors.torch import load_file, load_model
from transformers import Trainer, TrainingArguments

def dense():
    return transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/dense")

def adapted():
    return peft.get_peft_model(dense(), peft.LoraConfig(**json.loads(sys.argv[3])))

def resume(model, checkpoint):
    settings = TrainingArguments(
        f"{folder}/again", per_device_train_batch_size=1, max_steps=3, report_to=[], use_cpu=True
    )
    data = [{"input_ids": list(range(2, 10)), "labels": list(range(2, 10))}] * 3
    Trainer(model, settings, train_dataset=data).train(resume_from_checkpoint=checkpoint)

def swapped(model):
    from peft.utils.hotswap import hotswap_adapter_from_state_dict
    hotswap_adapter_from_state_dict(
        model, load_file(f"{folder}/adapter/adapter_model.safetensors"), "default",
        model.peft_config["default"],
    )

ways = {
    "strict": lambda: dense().load_state_dict(load_file(f"{folder}/weights.safetensors")),
    "of_a_folder": lambda: dense().load_state_dict(load_file(f"{folder}/bands/model.safetensors")),
    "load_model": lambda: load_model(dense(), f"{folder}/weights.safetensors"),
    "accelerate": lambda: accelerate.load_checkpoint_in_model(
        dense(), f"{folder}/weights.safetensors", strict=True
    ),
    "trainer": lambda: resume(dense(), f"{folder}/full/checkpoint-1"),
    "adapter_trainer": lambda: resume(adapted(), f"{folder}/lora/checkpoint-1"),
    "hot_swap": lambda: swapped(adapted()),
    "set_state": lambda: peft.set_peft_model_state_dict(
        adapted(), load_file(f"{folder}/adapter/adapter_model.safetensors")
    ).unexpected_keys,
}
found = {}
for name in sys.argv[4:]:
    try:
        found[name] = f"done: {ways[name]()}"
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""
WAYS = (
    *("strict", "of_a_folder", "load_model", "accelerate"),
    *("trainer", "adapter_trainer", "hot_swap", "set_state"),
)


def small(model):
    return model.float()


def train(model, folder, steps=1, resume=None, **keywords):
    settings = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=1,
        max_steps=steps,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **keywords,
    )
    data = [{"input_ids": list(range(2, 10)), "labels": list(range(2, 10))}] * 3
    trainer = transformers.Trainer(model, settings, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What band models without sinks leave behind: weights, checkpoints and an adapter."""
    folder = tmp_path_factory.mktemp("saved")
    small(build("llama")).save_pretrained(folder / "dense")
    model = small(banded("llama"))
    model.save_pretrained(folder / "bands")
    save_file(model.state_dict(), folder / "weights.safetensors")
    train(model, folder / "full")
    adapted = peft.get_peft_model(small(banded("llama")), peft.LoraConfig(**LORA))
    train(adapted, folder / "lora")
    adapted.save_pretrained(folder / "adapter")
    return folder


def opened(mode, folder, *names):
    command = [sys.executable, "-c", OPEN, mode, str(folder), json.dumps(LORA), *names]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
    return json.loads(result.stdout.splitlines()[-1])


def test_weights_alone_fail_by_name(saved):
    """In a process that never imported the library, or as near to it as PEFT allows."""
    found = opened("plain", saved, *WAYS)
    for name in ("trainer", "adapter_trainer"):
        assert f"spattention: {CALL} training is resumed" in found[name]
        assert found[name].startswith("TypeError")
    for name in ("strict", "of_a_folder", "load_model", "accelerate", "hot_swap"):
        assert not found[name].startswith("done"), name
    for name in set(WAYS) - {"trainer", "adapter_trainer", "accelerate"}:
        assert f"self_attn.{MARK}" in found[name], found[name]


def test_registered_processes_refuse_them_too(saved):
    """An adapter's folder brings its bands back, as its config is there; weights alone do not."""
    found = opened("register", saved, *(way for way in WAYS if way != "hot_swap"))
    assert found.pop("adapter_trainer") == "done: None"
    for name, result in found.items():
        assert (
            "weights must be loaded into a model with the attention that they were saved" in result
        )
        assert f"{CALL} model is loaded" in result, name
        assert result.startswith("ValueError"), name


def test_marks_tell_what_they_mark(saved):
    """Readable with safetensors alone; layers that keep their attention have none."""
    weights = load_file(saved / "bands" / "model.safetensors")
    mark = weights[f"model.layers.1.self_attn.{MARK}"]
    assert mark_text(mark).startswith(f"spattention: {CALL} model is loaded; attention ")
    assert mark_text(mark) != mark_text(weights[f"model.layers.0.self_attn.{MARK}"])
    assert bytes(mark.byte().tolist()).decode() == mark_text(mark)
    partly = spa.hf.apply(build("llama"), FIRST, layers=[1])
    assert [name for name in partly.state_dict() if MARK in name] == [
        f"model.layers.1.self_attn.{MARK}"
    ]


@pytest.mark.parametrize("source", ["weights.safetensors", "dense/model.safetensors"])
@pytest.mark.parametrize("assign", [False, True])
def test_weights_alone_load_into_bands(source, assign, saved):
    """Marked or not, as from a dense model or an earlier version; marked again when saved."""
    ids = tokens(1, 9)
    config = transformers.AutoConfig.from_pretrained(saved / "bands")
    with torch.device("meta" if assign else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="spattention"
        )
    weights = load_file(saved / source)
    model.load_state_dict(weights, assign=assign)
    if not assign:
        wanted = small(banded("llama"))
        torch.testing.assert_close(logits(model.eval(), ids), logits(wanted, ids))
    assert "is loaded; attention" in mark_text(
        model.state_dict()[f"model.layers.0.self_attn.{MARK}"]
    )


@pytest.mark.parametrize(
    "change", [lambda w: w.bfloat16(), lambda w: 0.75 * w + 0.25 * w, lambda w: w.clone()]
)
def test_marks_bear_arithmetic(change):
    """Averages and conversions of weights meet every tensor of a state dict."""
    model, other = banded("llama"), banded("llama", seed=1)
    other.load_state_dict({name: change(w) for name, w in model.state_dict().items()})
    averaged = torch.optim.swa_utils.AveragedModel(other, use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(other)
    model.load_state_dict(averaged.module.state_dict())


def test_state_dicts_are_averaged_by_hand():
    """Programs add and scale every tensor in place: integers would refuse, or overflow."""
    model, other = banded("llama"), banded("llama", seed=1)
    average = {name: weight.clone() for name, weight in model.state_dict().items()}
    for name, weight in other.state_dict().items():
        average[name].mul_(0.5).add_(weight, alpha=0.5)
    model.load_state_dict(average)
    total = sum(other.state_dict()[f"model.layers.0.self_attn.{MARK}"] for _ in range(3)) / 3
    own = model.state_dict()[f"model.layers.0.self_attn.{MARK}"]
    assert mark_text(total) == mark_text(own)


def test_marks_of_another_attention_are_refused():
    heads, span = 4, 24
    other = related.apply(build("llama", num_key_value_heads=4), related.MEA(heads, span))
    weights = other.state_dict()
    model = banded("llama", num_key_value_heads=4)
    with pytest.raises(ValueError, match=r'saved from, "mea: .* got "spattention: '):
        model.load_state_dict(weights, strict=False)
    plain = remove(other)
    assert not any(MARK in name for name in plain.state_dict())


@pytest.mark.parametrize("length", [0, 81])
def test_folders_without_marks_still_load(length, saved, tmp_path, caplog):
    """As earlier versions wrote them, without marks or without digests: no error, no warning, and
    the next save marks them.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(saved / "bands")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    plain = {
        name: weight[:length] if MARK in name else weight
        for name, weight in weights.items()
        if length or MARK not in name
    }
    save_file(plain, tmp_path / "model.safetensors", {"format": "pt"})
    caplog.clear()
    transformers.logging.enable_propagation()
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    transformers.logging.disable_propagation()
    assert not info["missing_keys"]
    again.load_state_dict(plain)
    assert "MISSING" not in caplog.text
    ids = tokens(1, 9)
    assert torch.equal(logits(again, ids), logits(model, ids))
    buffers = dict(again.named_buffers())  # not left as memory was
    marks = [mark_text(buffers[f"model.layers.{layer}.self_attn.{MARK}"]) for layer in (0, 1)]
    again.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert [mark_text(mark) for name, mark in weights.items() if MARK in name] == marks
    assert marks[1].startswith(f"spattention: {CALL} model is loaded; attention ")


def test_adapter_weights_in_memory_go_anywhere():
    """From one live model to another, as for a comparison with dense attention."""
    model = peft.get_peft_model(banded("llama"), peft.LoraConfig(**LORA))
    dense = peft.get_peft_model(build("llama"), peft.LoraConfig(**LORA))
    weights = peft.get_peft_model_state_dict(model)
    assert sum(MARK in name for name in weights) == 2
    assert not any(
        MARK in k for k in peft.set_peft_model_state_dict(dense, weights).unexpected_keys
    )
    ids = tokens(1, 9)
    torch.testing.assert_close(logits(dense, ids), logits(build("llama"), ids), **EXACT)


@pytest.mark.parametrize("lora", [False, True])
def test_the_trainer_resumes_the_same_bands(lora, saved, tmp_path):
    checkpoint = saved / ("lora" if lora else "full") / "checkpoint-1"

    def model(pattern):
        made = small(banded("llama", pattern))
        return peft.get_peft_model(made, peft.LoraConfig(**LORA)) if lora else made

    trainer = train(model((FIRST, SECOND)), tmp_path, steps=2, resume=str(checkpoint))
    assert trainer.state.global_step == 2
    with pytest.raises(ValueError, match="must be loaded into a model with"):
        train(model((SECOND, FIRST)), tmp_path, steps=2, resume=str(checkpoint))


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe", b"[" * 99_999, b'{"epoch": 1'])
def test_a_damaged_state_is_named(content, tmp_path):
    """The parser's own message does not tell which file it read."""
    train(small(banded("llama")), tmp_path)
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"trainer_state\.json must hold "):
        train(small(banded("llama")), tmp_path, 2, str(tmp_path / "checkpoint-1"))


def test_states_of_dense_training_are_as_before(tmp_path):
    train(small(build("llama")), tmp_path)
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert not any("spattention" in name for name in state)
    resumed = train(small(banded("llama")), tmp_path, 2, str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 2


def test_a_section_is_not_lost_while_bands_run(tmp_path):
    """Without it a live model ran with bands, and came back dense."""
    model, ids = banded("llama"), tokens(1, 9)
    del model.config.spattention
    with pytest.raises(ValueError, match=r"`config\.spattention` must be there to save a model"):
        model.save_pretrained(tmp_path)
    model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path)
    assert not any(MARK in name for name in load_file(tmp_path / "model.safetensors"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, ids), logits(build("llama"), ids), **EXACT)


def test_a_section_covers_every_marked_layer(tmp_path):
    """A config that was edited so that some layers run dense does not open."""
    banded("llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["spattention"]["layers"][1] = None
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"must name the attention of all .*layers\.1.*{MARK}"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    config["spattention"]["layers"] = [None, None]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must give at least one layer a pattern, got None for"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("options", [{}, {"attn_implementation": None}])
@pytest.mark.parametrize("family", ["llama", "llava"])
def test_a_cut_section_does_not_open_dense(family, options, tmp_path):
    """Such a model ran nothing or dense, and was saved as a dense one."""
    model, auto = banded("llama"), transformers.AutoModelForCausalLM
    if family == "llava":
        model, auto = banded_llava(), transformers.AutoModelForImageTextToText
    model.save_pretrained(tmp_path)
    named = model.config._attn_implementation
    assert auto.from_pretrained(tmp_path, **options).config._attn_implementation == named
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config.get("text_config", config)["spattention"]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"must name the attention of all .*{MARK}.*restore the"):
        auto.from_pretrained(tmp_path, **options)


def banded_llava():
    text = build("llama").config
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=1)
    return spa.hf.apply(transformers.LlavaForConditionalGeneration(config), FIRST)


@pytest.mark.parametrize("name", ["spattention", "mea"])
def test_a_version_is_no_bool(name, tmp_path):
    """JSON's `true` equals 1 in Python."""
    model = build("llama", num_key_value_heads=4)
    if name == "mea":
        related.apply(model, related.MEA(4, 24))
    else:
        spa.hf.apply(model, FIRST)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config[name]["version"] = True
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"`config\.{name}` must .* version 1.*True"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_config_of_ones_own_is_refused(saved):
    """The weights say that there were bands; a section that was taken off says that it is meant."""
    plain = build("llama").config
    with pytest.raises(ValueError, match=rf"must name the attention of all .*{MARK}"):
        transformers.AutoModelForCausalLM.from_pretrained(saved / "bands", config=plain)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_marks_cast_to_eight_bits_are_compared(dtype):
    """A state dict that was cast by hand, and one that was cast back since."""
    state = {name: tensor.to(dtype) for name, tensor in banded("llama").state_dict().items()}
    for weights in (state, {name: tensor.float() for name, tensor in state.items()}):
        model = banded("llama")
        model.load_state_dict(weights)
        found = model.lm_head.weight
        torch.testing.assert_close(found, state["lm_head.weight"].to(found.dtype))
        other = spa.hf.apply(build("llama"), [SECOND, FIRST])
        match = f"a mark that cannot be read in .*, of {next(iter(weights.values())).dtype}, got"
        with pytest.raises(ValueError, match=match):
            other.load_state_dict(weights)
        with pytest.raises(ValueError, match=r'a mark that cannot be read in .*, got "none"'):
            build("llama").load_state_dict(weights)
