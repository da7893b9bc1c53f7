"""Checkpoints of band models that other libraries read: Accelerate, PyTorch's distributed
checkpoints, wrappers of a model; and models whose bands were taken off.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, load_model, save_file
from tiny import EXACT, FIRST, HEADS, SECOND, SPAN, banded, build, logits, tokens
from torch.distributed.checkpoint.state_dict import get_model_state_dict

import spattention as spa
from spattention import baselines
from spattention.hf.weights import MARK

accelerate = pytest.importorskip("accelerate")

OTHERS = "weights must be loaded into a model with the attention that they were saved from"
ON_CPU = {"": "cpu"}
OFFLOADED = {
    **dict.fromkeys(["model.embed_tokens", "model.layers.1", "model.norm"], "cpu"),
    **dict.fromkeys(["model.rotary_emb", "lm_head"], "cpu"),
    "model.layers.0": "disk",
}


class Wrapped(torch.nn.Module):
    """A model inside another module, as trainers have it."""

    def __init__(self, model):
        super().__init__()
        self.model = model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a dense model, one with bands, one with sinks too, and that without marks."""
    folder = tmp_path_factory.mktemp("saved")
    build("llama").float().save_pretrained(folder / "dense")
    banded("llama").float().save_pretrained(folder / "bands")
    banded("llama", sinks=1.0).float().save_pretrained(folder / "sinks")
    weights = load_file(folder / "sinks" / "model.safetensors")
    (folder / "unmarked").mkdir()
    plain = {name: weight for name, weight in weights.items() if MARK not in name}
    save_file(plain, folder / "unmarked" / "model.safetensors")
    return folder


def empty(folder, buffers=False, attention="spattention"):
    config = transformers.AutoConfig.from_pretrained(folder)
    with accelerate.init_empty_weights(include_buffers=buffers):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    # No checkpoint holds the frequencies of rotary positions, of any model.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


@pytest.mark.parametrize("source", ["sinks", "unmarked"])
@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("device_map", [ON_CPU, OFFLOADED, "auto"])
def test_accelerate_fills_empty_models(source, buffers, device_map, saved, tmp_path):
    """Marks that a checkpoint lacks stay on the meta device with buffers of an empty model."""
    model = accelerate.load_checkpoint_and_dispatch(
        empty(saved / "sinks", buffers),
        str(saved / source / "model.safetensors"),
        device_map=device_map,
        offload_folder=tmp_path,
    )
    ids = tokens(1, 9)
    wanted = banded("llama", sinks=1.0).float()
    assert torch.equal(logits(model, ids), logits(wanted, ids))
    assert all(mark.device.type == "cpu" for name, mark in model.named_buffers() if MARK in name)


@pytest.mark.parametrize("source", ["dense", "bands"])
@pytest.mark.parametrize("device_map", [None, ON_CPU])
def test_accelerate_names_missing_sinks(source, device_map, saved):
    """They stay on the meta device, of which only PyTorch's internals said something."""
    with pytest.raises(ValueError, match=r"must hold the sinks that `config\.spattention` names"):
        accelerate.load_checkpoint_and_dispatch(
            empty(saved / "sinks"), str(saved / source / "model.safetensors"), device_map=device_map
        )


@pytest.mark.parametrize("device_map", [None, ON_CPU])
def test_accelerate_asks_for_the_same_bands(device_map, saved):
    def load(model):
        file = str(saved / "bands" / "model.safetensors")
        return accelerate.load_checkpoint_and_dispatch(model, file, device_map=device_map)

    with pytest.raises(ValueError, match=OTHERS + r'.* got "none"'):
        load(empty(saved / "dense", attention="sdpa"))
    other = banded("llama", (SECOND, FIRST)).float()
    with pytest.raises(ValueError, match=OTHERS + r'.* got "spattention: '):
        load(other)
    load(banded("llama", seed=1).float())


@pytest.mark.parametrize("way", ["strict", "not_strict", "load_model", "wrapped", "wrapped_file"])
def test_tensors_of_other_bands_are_refused(way, saved, tmp_path):
    """In whatever a model is wrapped, strict or not; into the same bands they go."""
    file = saved / "bands" / "model.safetensors"

    def load(model):
        if way == "load_model":
            return load_model(model, file, strict=False)
        if not way.startswith("wrapped"):
            return model.load_state_dict(load_file(file), strict=way == "strict")
        weights = {f"model.{name}": weight for name, weight in load_file(file).items()}
        if way == "wrapped_file":
            torch.save({**Wrapped(banded("llama").float()).state_dict()}, tmp_path / "weights.pt")
            weights = torch.load(tmp_path / "weights.pt")
        return Wrapped(model).load_state_dict(weights, strict=False)

    ids = tokens(1, 9)
    for model in (banded("llama", (SECOND, FIRST)).float(), build("llama").float()):
        before = logits(model, ids)
        with pytest.raises(ValueError, match=OTHERS):
            load(model)
        assert torch.equal(logits(model, ids), before)  # nothing was loaded
    same = banded("llama", seed=1).float()
    load(same)
    assert torch.equal(logits(same, ids), logits(banded("llama").float(), ids))


def test_wrapped_weights_in_memory_go_anywhere():
    weights = Wrapped(banded("llama", seed=1)).state_dict()
    ids = tokens(1, 9)
    for model in (build("llama"), banded("llama", (SECOND, FIRST))):
        for taken in (weights, copy.deepcopy(weights)):
            Wrapped(model).load_state_dict(taken, strict=False)
    assert torch.equal(logits(model, ids), logits(banded("llama", (SECOND, FIRST), seed=1), ids))


OPEN_WRAPPED = """
import sys, torch
torch.load(sys.argv[1])
"""


def test_wrapped_weights_need_the_library(tmp_path):
    """A plain dict of tensors, as trainers save it, has none of PyTorch's notes."""
    weights = Wrapped(banded("llama")).state_dict()
    torch.save({"state_dict": dict(weights)}, tmp_path / "weights.ckpt")
    command = [sys.executable, "-c", OPEN_WRAPPED, str(tmp_path / "weights.ckpt")]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert result.returncode != 0
    assert "GLOBAL spattention.hf.weights.call_register_before_loading" in result.stderr


def dcp_loaded(model, folder, nested=True):
    weights = model.state_dict()
    dcp.load({"model": weights} if nested else weights, checkpoint_id=folder)
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("nested", [False, True])
def test_distributed_checkpoints_need_their_bands(nested, tmp_path):
    """They are asked for the tensors of a state dict, and would never show the marks."""
    weights = banded("llama").state_dict()
    dcp.save({"model": weights} if nested else weights, checkpoint_id=tmp_path)
    ids = tokens(1, 9)
    same = dcp_loaded(banded("llama", seed=1), tmp_path, nested)
    assert torch.equal(logits(same, ids), logits(banded("llama"), ids))
    with pytest.raises(BaseException, match=rf"that of a model with the attention .*{MARK}"):
        dcp_loaded(build("llama"), tmp_path, nested)
    with pytest.raises(BaseException, match="that of a model with the attention"):
        dcp_loaded(banded("llama", (SECOND, FIRST)), tmp_path, nested)


OPEN_DISTRIBUTED = """
import sys, torch, transformers
import torch.distributed.checkpoint as dcp
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
dcp.load({"model": model.state_dict()}, checkpoint_id=sys.argv[2])
"""


@pytest.mark.parametrize("way", ["state_dict", "get_model_state_dict"])
def test_distributed_checkpoints_need_the_library(way, saved, tmp_path):
    """Their metadata is pickled, with the names of a state dict."""
    model = banded("llama").float()
    weights = model.state_dict() if way == "state_dict" else get_model_state_dict(model)
    dcp.save({"model": weights}, checkpoint_id=tmp_path)
    command = [sys.executable, "-c", OPEN_DISTRIBUTED, str(saved / "dense"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert result.returncode != 0
    asked = "spattention: spattention.hf.register() must be called before these weights are loaded"
    assert asked in result.stderr


def test_copies_of_weights_need_the_library(tmp_path):
    """The names of marks ask for it where nothing else of a state dict is left."""
    weights = {name: weight.clone() for name, weight in banded("llama").state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "weights.ckpt")
    assert torch.load(tmp_path / "weights.ckpt")["state_dict"].keys() == weights.keys()
    command = [sys.executable, "-c", OPEN_WRAPPED, str(tmp_path / "weights.ckpt")]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert "GLOBAL spattention.hf.weights.call_register_before_loading" in result.stderr


def test_distributed_checkpoints_of_dense_models(tmp_path):
    """They hold no marks, as those of earlier versions, and load into bands."""
    dcp.save({"model": build("llama").state_dict()}, checkpoint_id=tmp_path)
    model, ids = dcp_loaded(banded("llama", seed=1), tmp_path), tokens(1, 9)
    assert torch.equal(logits(model, ids), logits(banded("llama"), ids))
    assert any(MARK in name for name in model.state_dict())
    dense = dcp_loaded(build("llama", seed=1), tmp_path)
    assert torch.equal(logits(dense, ids), logits(build("llama"), ids))


@pytest.mark.parametrize("taken_before", [False, True])
@pytest.mark.parametrize("is_loaded", [False, True])
def test_bands_that_are_taken_off_leave_nothing(taken_before, is_loaded, tmp_path):
    """Sinks stayed in a dense model's folder, as unexpected weights."""
    model, ids = banded("llama", sinks=1.0), tokens(1, 9)
    if is_loaded:
        model.save_pretrained(tmp_path)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    weights = model.state_dict() if taken_before else None
    model.set_attn_implementation("sdpa")
    del model.config.spattention
    model.save_pretrained(tmp_path, state_dict=weights)
    dense = build("llama")
    assert load_file(tmp_path / "model.safetensors").keys() == dense.state_dict().keys()
    assert "spattention" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    dense.load_state_dict(model.state_dict())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, ids), logits(build("llama"), ids), **EXACT)
    spa.hf.apply(model, (FIRST, SECOND), sinks=True)  # what the model has comes back with bands
    assert float(model.state_dict()["model.layers.0.self_attn.sinks"][0]) == 1.0


def test_a_baseline_that_is_taken_off_leaves_no_mark(tmp_path):
    """Marks stayed, so that the dense folder was refused as one with a config of its own."""
    model = baselines.apply(build("gpt_neox"), baselines.Longformer(HEADS, SPAN))
    del model.config.longformer
    with pytest.raises(
        ValueError, match=r"`config\.longformer` must be there to save a model that"
    ):
        model.save_pretrained(tmp_path)
    model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path)
    again, ids = transformers.AutoModelForCausalLM.from_pretrained(tmp_path), tokens(1, 9)
    assert torch.equal(logits(again, ids), logits(build("gpt_neox"), ids))


def test_dealt_weights_are_those_of_their_bands(tmp_path):
    """State dicts are in the natural order; their notes and marks were in the dealt one."""
    dealt = spa.hf.deal(banded("llama"), 2)
    torch.save(dealt.state_dict(), tmp_path / "weights.pt")
    save_file(dealt.state_dict(), tmp_path / "weights.safetensors")
    ids = tokens(1, 9)
    for weights in (
        torch.load(tmp_path / "weights.pt"),
        load_file(tmp_path / "weights.safetensors"),
    ):
        for model in (banded("llama", seed=1), spa.hf.deal(banded("llama", seed=1), 2)):
            model.load_state_dict(weights)
            torch.testing.assert_close(logits(model, ids), logits(banded("llama"), ids), **EXACT)


@pytest.mark.parametrize("way", ["edited", "config"])
def test_a_config_of_other_bands_is_refused(way, tmp_path):
    """The weights were trained under others: `apply` changes bands, after loading."""
    banded("llama").save_pretrained(tmp_path / "saved")
    banded("llama", (SECOND, FIRST)).save_pretrained(tmp_path / "other")
    keywords = {}
    if way == "edited":
        shutil.copy(tmp_path / "other" / "config.json", tmp_path / "saved" / "config.json")
    if way == "config":
        keywords["config"] = transformers.AutoConfig.from_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=OTHERS):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", **keywords)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_marks_survive_half_precision(dtype, tmp_path):
    """Every code of a text is a number of these dtypes."""
    model = banded("llama").to(dtype)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))


def test_layers_of_other_names_are_refused(tmp_path):
    """Transformers warns of missing weights, and starts them from random numbers."""
    model = banded("llama")
    model.model.layers[0] = torch.compile(model.model.layers[0])
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"must name its layers as the model does, got .*_orig_mod"
    ):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
