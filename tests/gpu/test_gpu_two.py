"""What needs two GPUs: shards over NCCL, ranks that disagree or die, training that goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from spattention.training.metrics import METRICS, read_metrics

from .test_gpu_fsdp2 import train, write_recipe

SCRIPT = Path(__file__).with_name("two_gpus.py")
STEPS = 24
pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def launch(*arguments: object, processes: int = 2) -> str:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [sys.executable, *(torchrun if processes else []), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.mark.parametrize("what", ["attend", "disagree"])
def test_shards_over_nccl(what: str) -> None:
    """Attention of every way within the budget of one GPU, and ranks that disagree."""
    assert f"{what} is right on two GPUs" in launch(SCRIPT, what)


def test_a_dead_rank_ends_the_other() -> None:
    """Within the timeout of the group, instead of waiting for ever."""
    assert "ended after" in launch(SCRIPT, "dying", processes=0)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("data"))


FLOAT32 = ('precision="float32"', f"steps={STEPS}", "save_every=8", "evaluate_every=24")


def test_one_gpu_resumes_what_two_left(recipe: Path, tmp_path: Path) -> None:
    """Losses of two GPUs, and of one that resumes their checkpoint, are those of one."""
    with ThreadPoolExecutor() as pool:
        one = pool.submit(train, tmp_path / "one", recipe, *FLOAT32)
        two = pool.submit(train, tmp_path / "two", recipe, *FLOAT32, processes=2)
        expected = one.result()
        assert two.result()["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    shutil.rmtree(tmp_path / "two" / f"checkpoint-{STEPS}")
    again = train(tmp_path / "two", recipe, *FLOAT32, processes=1)
    for name in ("loss", "eval_loss"):
        assert again[name] == pytest.approx(expected[name], rel=1e-3), name


def test_a_killed_rank_is_resumed(recipe: Path, tmp_path: Path) -> None:
    """A rank is killed after a checkpoint; the run ends, and two ranks go on from there."""
    with ThreadPoolExecutor() as pool:
        one = pool.submit(train, tmp_path / "one", recipe, *FLOAT32)
        killed = pool.submit(kill_a_rank, tmp_path / "two", recipe)
        expected = one.result()
        assert killed.result() != 0
    assert not (tmp_path / "two" / f"checkpoint-{STEPS}").exists()
    before = [e["step"] for e in read_metrics(tmp_path / "two" / METRICS) if "loss" in e]
    assert before, "nothing was logged before"
    assert before[-1] < STEPS, "the run was over before"
    again = train(tmp_path / "two", recipe, *FLOAT32, processes=2)
    for name in ("loss", "eval_loss"):
        assert again[name] == pytest.approx(expected[name], rel=1e-3), name


def kill_a_rank(output: Path, recipe: Path) -> int:
    """Exit status of a run of two ranks, of which one is killed after the first checkpoint."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["-m", "spattention", "train", str(recipe), "--output", str(output), "--set"]
    changes = [*FLOAT32, 'parallel="fsdp2"', "workers=0"]
    with subprocess.Popen(
        [sys.executable, *torchrun, *command, *changes],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        end = time.monotonic() + 120
        while not (output / "checkpoint-8" / "trainer_state.json").exists():
            assert process.poll() is None, "the run ended before its first checkpoint"
            assert time.monotonic() < end, "no checkpoint was written"
            time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        return process.wait(60)
