"""Adapters that were trained on bands, opened in a new process as people open them."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch
from adapted import IDS, base, folder_of, peft, saved
from tiny import EXACT

import spattention as spa

__all__ = ["base", "saved"]  # fixtures

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


def open_in_new_process(mode, folder, base, orders):
    torch.save(IDS, folder / "ids.pt")
    command = [sys.executable, "-c", OPEN, mode, str(folder / "ids.pt"), str(base)]
    command += [",".join([str(path), *names]) for path, names in orders]
    subprocess.run(command, check=True, capture_output=True)
    return torch.load(folder / "ids.pt.found")


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
