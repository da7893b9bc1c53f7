"""Two processes (gloo, CPU) train as one does at the same global batch."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launching import launch

from spattention.cli import main
from spattention.training.metrics import METRICS, read_metrics
from spattention.training.pretrain import Outcome, prepare_model, pretrain
from spattention.training.recipe import read_recipe
from tests.training.small_run import write_data

HERE = Path(__file__).parent
RECIPE = """
model = "olmoe-tiny"
layers = 1
vocabulary = 320
data = "{data}"
context = 32
steps = 6
batch = 4
micro_batch = 2
learning_rate = 1e-2
warmup = 2
precision = "float32"
threads = 1
log_every = 1
evaluate_every = 3
validation_windows = 7  # no multiple of what the processes take at once
held_out = 0.2
save_every = 3
tensorboard = false
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "recipe.toml").write_text(RECIPE.format(data=write_data(folder, documents=60)))
    return folder / "recipe.toml"


def alone(recipe, folder, *changes):
    """Train in this process, from the start or where the folder stands."""
    assert pretrain(read_recipe(recipe, changes), folder).finished


def losses(folder, name):
    return [e[name] for e in read_metrics(folder / METRICS) if name in e]


def test_ddp_gives_the_losses_of_one_process(recipe, tmp_path):
    """DDP gives the losses of one process and goes on with another number."""
    alone(recipe, tmp_path / "one")
    shown = launch(2, "-m", "spattention", "train", recipe, "--output", tmp_path / "two")
    assert "2 devices" in shown
    for name in ("loss", "grad_norm", "eval_loss"):
        expected = losses(tmp_path / "one", name)
        assert len(expected) == (2 if name == "eval_loss" else 6)
        assert losses(tmp_path / "two", name) == pytest.approx(expected, rel=1e-5)
    # One process goes on where two left off, at the next sample.
    for path in (tmp_path / "two" / "checkpoint-6").iterdir():
        path.unlink()
    (tmp_path / "two" / "checkpoint-6").rmdir()
    alone(recipe, tmp_path / "two")
    assert losses(tmp_path / "two", "loss") == pytest.approx(
        losses(tmp_path / "one", "loss"), rel=1e-5
    )


def test_ddp_gradients_lie_in_their_buckets(recipe, tmp_path):
    """They are exchanged where they are, and not copied there and back."""
    shown = launch(2, HERE / "buckets.py", recipe, tmp_path / "run")
    found = re.findall(r"(\d+) gradients in (\d+) storages", shown)
    assert len(found) == 6  # one for each step
    for gradients, storages in found:
        assert int(storages) <= 2 < int(gradients)


def test_ddp_sums_the_passes_of_a_step(recipe, tmp_path):
    """Two passes of each process, of which the last exchanges, in buckets that hold the sum."""
    changes = ("batch=8", "held_out=0", "validation_windows=0", "steps=4")
    alone(recipe, tmp_path / "one", *changes)
    train = ("-m", "spattention", "train", recipe, "--set", *changes, "--output", tmp_path / "two")
    launch(2, *train)
    for name in ("loss", "grad_norm"):
        expected = losses(tmp_path / "one", name)
        assert len(expected) == 4
        assert losses(tmp_path / "two", name) == pytest.approx(expected, rel=1e-5)


def test_the_command_leaves_no_process_group(recipe, tmp_path, monkeypatch):
    """A rank that ends with threads of gloo may abort: seen once in some hundred runs."""

    def joined(_, output, **options):
        store = dist.FileStore(str(tmp_path / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        return Outcome(output, 6, 6)

    monkeypatch.setattr("spattention.cli.train.pretrain", joined)
    assert main(["train", str(recipe), "--output", str(tmp_path / "run")]) == 0
    assert not dist.is_initialized()


@pytest.mark.slow
def test_a_killed_rank_is_resumed(recipe, tmp_path):
    """A rank is killed after a checkpoint; the run ends, and two ranks go on from there."""
    changes = ("steps=24", "save_every=8", "evaluate_every=24")
    alone(recipe, tmp_path / "one", *changes)
    train = ("-m", "spattention", "train", recipe, "--output", tmp_path / "two", "--set", *changes)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    command = map(str, (*torchrun, *train))
    with subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        end = time.monotonic() + 120
        while not (tmp_path / "two" / "checkpoint-8" / "trainer_state.json").exists():
            assert process.poll() is None, "the run ended before its first checkpoint"
            assert time.monotonic() < end, "no checkpoint was written"
            time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert process.wait(60) != 0
    assert len(losses(tmp_path / "two", "loss")) < 24, "the run was over before"
    launch(2, *train)
    for name in ("loss", "eval_loss"):
        expected = losses(tmp_path / "one", name)
        assert losses(tmp_path / "two", name) == pytest.approx(expected, rel=1e-4), name


def test_a_prepared_model_trains_under_fsdp2():
    """Accelerate, and so the Trainer, shards on GPUs alone: here by PyTorch's own function."""
    launch(2, HERE / "sharded.py")


def test_what_does_not_go_is_refused_and_not_replaced(recipe, tmp_path):
    with pytest.raises(ValueError, match='`parallel` must be "ddp" on the CPU, got "fsdp2"'):
        pretrain(read_recipe(recipe, ["parallel=fsdp2"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    low = read_recipe(recipe, ["precision=bfloat16"])
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match='several devices needs `parallel` = "fsdp2"'):
        prepare_model(low, model, passes=1, device=torch.device("cpu"), devices=2)
