"""FSDP2 through the command, on one GPU: Accelerate shards on GPUs alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import spattention as spa
from spattention.data.token_file import write_token_file
from spattention.data.tokens import TokenStream
from spattention.training.metrics import METRICS, read_metrics

RECIPE = """
model = "olmoe-tiny"
layers = 2
vocabulary = 320
data = "{data}"
context = 128
steps = 8
batch = 4
micro_batch = 2
learning_rate = 3e-3
warmup = 2
precision = "bfloat16"
log_every = 1
evaluate_every = 4
validation_windows = 4
save_every = 4
tensorboard = false
"""


def train(output: Path, recipe: Path, *changes: str, processes: int = 0) -> dict[str, list]:
    """Metrics of a run under FSDP2 on a number of GPUs, or of one process without it for 0."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    changes = (*changes, 'parallel="fsdp2"') if processes else changes
    command = ["-m", "spattention", "train", str(recipe), "--output", str(output), "--set"]
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    visible = {} if processes else {"CUDA_VISIBLE_DEVICES": first}  # one process takes one GPU
    done = subprocess.run(
        [
            sys.executable,
            *(torchrun if processes else []),
            *command,
            *changes,
            "workers=0",
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | visible,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    entries = read_metrics(output / METRICS)
    return {
        name: [e[name] for e in entries if name in e] for name in ("loss", "grad_norm", "eval_loss")
    }


def write_recipe(folder: Path) -> Path:
    """A recipe and its data in a folder."""
    random = np.random.default_rng(0)
    documents = [np.append(random.integers(8, 320, 199), 7).astype(np.uint16) for _ in range(60)]
    write_token_file(folder / "a.u16.xz", TokenStream.from_documents(documents), 7)
    (folder / "recipe.toml").write_text(RECIPE.format(data=folder / "a.u16.xz"))
    return folder / "recipe.toml"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_fsdp2_gives_the_losses_of_one_process(
    recipe: Path, tmp_path: Path, checkpointing: str
) -> None:
    change = f"checkpointing={checkpointing}"
    exact = train(tmp_path / "exact", recipe, 'precision="float32"')
    alone = train(tmp_path / "alone", recipe, change)
    shards = train(tmp_path / "shards", recipe, change, processes=1)
    for name in exact:
        # Both round to bfloat16, each in its own places.
        error = max(abs(a - b) for a, b in zip(alone[name], exact[name], strict=True))
        assert shards[name] == pytest.approx(exact[name], abs=2 * error + 1e-3), name
    rounded = torch.tensor(shards["loss"]).to(torch.bfloat16).tolist()
    assert shards["loss"] != pytest.approx(rounded, abs=1e-6), "the loss was rounded to bfloat16"


def test_a_sharded_run_resumes_and_opens(recipe: Path, tmp_path: Path) -> None:
    """A sharded run goes on and its checkpoint opens."""
    whole = train(tmp_path / "whole", recipe, processes=1)
    spa.hf.register()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-8")
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    assert model.config.spattention["patterns"]
    for path in (tmp_path / "whole" / "checkpoint-8").iterdir():
        path.unlink()
    (tmp_path / "whole" / "checkpoint-8").rmdir()
    again = train(tmp_path / "whole", recipe, processes=1)
    for name in ("loss", "eval_loss"):
        assert again[name] == pytest.approx(whole[name], rel=1e-3), name
