"""Models of which PEFT adapters are made, and folders of adapters that were trained on bands."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny import FIRST, SECOND, build, logits, tokens

import spattention as spa

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
