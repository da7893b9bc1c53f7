"""Tools that never call `register()` open a folder when their user trusts its code, else not."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from saved_model import save
from tiny import FIRST, HEADS, banded, build, tokens

import spattention as spa
from spattention import baselines, related

TOOL = """
import json, sys, torch
from transformers import AutoModelForCausalLM
ids, *folders = sys.argv[1:]
ways = {"plain": {}, "not": {"trust_remote_code": False}, "trusted": {"trust_remote_code": True}}
for name, options in ways.items():
    for folder in folders:
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **options)
            said = json.dumps(model(torch.tensor(json.loads(ids))).logits.sum(-1).tolist())
            model.save_pretrained(folder + "/again")
        except Exception as error:
            said = " ".join(str(error).split())
        print(name, folder, said)
"""


def opened(home, ids, folders):
    """What each way to open each folder says, in one fresh process: `(way, folder)` to text."""
    done = subprocess.run(
        [sys.executable, "-c", TOOL, json.dumps(ids.tolist()), *map(str, folders)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"HF_MODULES_CACHE": str(home / "modules")},
    )
    assert done.returncode == 0, done.stderr
    lines = (line.split(" ", 2) for line in done.stdout.splitlines())
    return {(way, folder): said for way, folder, said in lines}


def test_a_tool_that_trusts_code_opens_a_folder(tmp_path):
    """Of bands in two families, and of a baseline; what it saves opens so again."""
    models = {name: banded(name) for name in ("llama", "qwen3")}
    models["baseline"] = baselines.apply(build("llama"), baselines.BigBird(HEADS, 64))
    ids, wanted = tokens(1, 17), {}
    for name, model in models.items():
        folder = tmp_path / name
        model.save_pretrained(folder)
        spa.hf.add_loader(folder)
        spa.hf.add_loader(folder)  # a second call changes nothing
        text = (folder / "modeling_spattention.py").read_text()
        assert len([line for line in text.splitlines() if line]) <= 16
        with torch.no_grad():
            wanted[str(folder)] = model.double()(ids).logits.sum(-1)
    said = opened(tmp_path, ids, wanted)
    again = opened(tmp_path, ids, [f"{folder}/again" for folder in wanted])
    for folder, logits in wanted.items():
        call = "baselines" if folder.endswith("baseline") else "hf"
        for way in ("plain", "not"):
            rule = f"spattention.{call}.register() must be called before this model"
            assert rule in said[way, folder]
        found = torch.tensor(json.loads(said["trusted", folder]), dtype=torch.float64)
        torch.testing.assert_close(found, logits)
        assert again["trusted", f"{folder}/again"] == said["trusted", folder]


def test_a_loader_is_saved_by_its_own_class_alone(tmp_path):
    """A model that came without the module is saved without a name of it."""
    banded("llama").save_pretrained(tmp_path)
    spa.hf.add_loader(tmp_path)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    found.save_pretrained(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["auto_map"] == {}


@pytest.mark.parametrize("kind", ["bands", "bigbird", "mea"])
def test_a_loader_needs_no_registration(kind, tmp_path):
    """A folder that an earlier process saved gets its loader from one call, in a fresh process that
    says nothing."""
    model = build("llama")
    if kind == "bands":
        spa.hf.apply(model, FIRST)
    else:
        named = baselines.BigBird(HEADS, 64) if kind == "bigbird" else related.MEA(HEADS, 64)
        baselines.apply(model, named)
    model.save_pretrained(tmp_path)
    code = "import sys, spattention; spattention.hf.add_loader(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert done.stdout == b""
    call = {"bands": "hf", "bigbird": "baselines", "mea": "related"}[kind]
    text = (tmp_path / "modeling_spattention.py").read_text()
    assert f"spattention.{call}.register()" in text.splitlines()


TRL_LOOKUP = """
import sys, transformers
config = transformers.AutoConfig.from_pretrained(sys.argv[1])
assert getattr(transformers, config.architectures[0], None) is None
assert "AutoModelForCausalLM" not in (config.auto_map or {})
try:
    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation=None)
except ValueError as error:
    print(error)
"""


def test_a_lookup_by_architecture_ends_by_name(tmp_path):
    """TRL looks a class up by `architectures`, then in `auto_map` without a check that it is there.
    The folder sends it on to `from_pretrained`, whose error names this library.
    """
    banded("llama").save_pretrained(tmp_path)
    command = [sys.executable, "-c", TRL_LOOKUP, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "spattention.hf.register() must be called" in done.stdout, done.stderr
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    model.set_attn_implementation("sdpa")
    del model.config.spattention
    model.save_pretrained(tmp_path / "dense")
    assert "auto_map" not in json.loads((tmp_path / "dense" / "config.json").read_text())


SERVER = """
import sys, transformers
from transformers import AutoConfig, AutoTokenizer
options = {"trust_remote_code": True, "attn_implementation": None}  # as `transformers serve`
config = AutoConfig.from_pretrained(sys.argv[1], **options)
assert type(config).__module__.startswith("transformers.models."), type(config)
architecture = getattr(transformers, config.architectures[0])
model = architecture.from_pretrained(sys.argv[1], **options)
print(model.config._attn_implementation, type(model).__name__)
"""


def called(program, folder):
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_MODULES_CACHE": str(folder / "modules")},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_server_finds_the_architecture(tmp_path):
    """`transformers serve` looks it up in `transformers` and passes no attention."""
    banded("llama").save_pretrained(tmp_path)
    spa.hf.add_loader(tmp_path)
    assert called(SERVER, tmp_path) == ["spattention", "LlamaForCausalLM"]
    assert transformers.SpattentionQwen3ForCausalLM is transformers.Qwen3ForCausalLM
    with pytest.raises(AttributeError, match="has no attribute BoomForCausalLM"):
        transformers.SpattentionBoomForCausalLM  # noqa: B018


def test_no_attention_asked_for_is_the_folders_own(tmp_path):
    banded("llama").save_pretrained(tmp_path)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=None)
    assert opened.config._attn_implementation == "spattention"
    dense = transformers.AutoModelForCausalLM.from_config(build("llama").config)
    assert dense.config._attn_implementation == "sdpa"


def test_a_loader_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json must be a file .* it is missing"):
        spa.hf.add_loader(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"must hold a whole model, got an adapter .*merge"):
        spa.hf.add_loader(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must hold a model with bands or a baseline"):
        spa.hf.add_loader(tmp_path)
    banded("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())
    for change, error in (
        ({"auto_map": {"AutoModel": "own.Model"}}, "must not have an `auto_map` of other code"),
        ({"architectures": ["SpattentionBoom"]}, r"as `architectures`, got \['SpattentionBoom'\]"),
        ({"architectures": None}, "as `architectures`, got None"),
        ({"fusion_config": {"x: os.system() must": False}}, "must hold a model with bands"),
        ({"fusion_config": None}, "must hold a model with bands"),
    ):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match=error):
            spa.hf.add_loader(tmp_path)
        assert not (tmp_path / "modeling_spattention.py").exists()


def test_our_own_commands_run_no_loader(tmp_path, monkeypatch):
    """A folder opens after `register()` as before, with its own class."""
    banded("llama").save_pretrained(tmp_path)
    spa.hf.add_loader(tmp_path)
    (tmp_path / "modeling_spattention.py").write_text("raise SystemExit('was run')")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is transformers.LlamaForCausalLM


HARNESS = """
import sys
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

options = {"trust_remote_code": True, "device": "cpu", "dtype": "float32", "prefix_token_id": 0}
model = HFLM(pretrained=sys.argv[1], **options)
assert model.model.config._attn_implementation == "spattention"
request = Instance("loglikelihood", {}, ("It was a", " dark night"), 0)
print(model.loglikelihood([request])[0][0])
"""


@pytest.mark.slow
def test_the_harness_opens_bands(tmp_path):
    """lm_eval calls no `register()`; it takes `trust_remote_code=True` from its user."""
    pytest.importorskip("lm_eval")
    folder = save(tmp_path)
    spa.hf.add_loader(folder)
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert -1000 < float(done.stdout.split()[-1]) < 0


@pytest.mark.parametrize("folder", [None, 5, [], b"folder"], ids=str)
def test_a_folder_is_a_path(folder):
    with pytest.raises(ValueError, match=f"`folder` must be a path, got {type(folder).__name__}"):
        spa.hf.add_loader(folder)
