"""Kill a training run again and again, and compare what comes out with an uninterrupted run.

    python tests/training/kills.py --kills 20 --seed 0

Each kill is SIGKILL: no handler, no `finally`, nothing flushed. It comes at a random time; at a
random file operation while a checkpoint or `losses.json` is written; or in the middle of a line of
`metrics.jsonl`. A run takes several kills, one after the other.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from spattention.training import callbacks
from spattention.training.checkpoints import newest_good, step_of
from spattention.training.metrics import METRICS, read_metrics
from spattention.training.pretrain import pretrain

sys.path.insert(0, str(Path(__file__).parent))
from small_run import losses, recipe, write_data

KINDS = ("time", "checkpoint", "metrics", "record")
CHANGES = {"steps": 60, "save_every": 3, "evaluate_every": 10}
ROUND = 7  # kills of one run: more might end it before they come
OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "fsync")
WRITES = os.O_WRONLY | os.O_RDWR


def doomed(data: Path, folder: Path, kind: str, seed: int, ready: Connection) -> None:
    """Train until the process is killed; called in a process of its own."""
    chance = random.Random(seed)
    torch.set_num_threads(1)

    def send(event: dict[str, Any]) -> None:
        if event["kind"] != "begin":
            return
        if kind == "metrics":
            _kill_in_a_line(chance)
        elif kind == "checkpoint":
            _kill_at_an_operation((".saving", "checkpoint-"), chance.randrange(1, 60))
        elif kind == "record":
            _kill_at_an_operation(("losses.json",), chance.randrange(1, 12))
        ready.send(event["step"])

    pretrain(recipe(data, **CHANGES), folder, send=send)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_in_a_line(chance: random.Random) -> None:
    """Kill in the n-th line of metrics, after some of its bytes."""
    whole, left, share = callbacks.append_metrics, [chance.randrange(1, 12)], chance.random()

    def torn(path: Path, entry: dict[str, Any]) -> None:
        left[0] -= 1
        before = path.stat().st_size
        whole(path, entry)
        if not left[0]:
            size = path.stat().st_size
            os.truncate(path, before + int(share * (size - before + 1)))
            _die()

    callbacks.append_metrics = torn


def _kill_at_an_operation(words: tuple[str, ...], count: int) -> None:
    """Kill at the n-th operation on a file whose path has one of the words."""
    left = [count]
    flush, save = os.fsync, torch.save

    def watch(event: str, arguments: Any) -> None:
        if event not in OPERATIONS or (event == "open" and not arguments[2] & WRITES):
            return
        paths = [str(a) for a in arguments if isinstance(a, (str, bytes, os.PathLike))]
        if any(word in path for path in paths for word in words):
            left[0] -= 1
            if not left[0]:
                _die()

    def watched_flush(handle: int) -> None:
        sys.audit("fsync", os.readlink(f"/proc/self/fd/{handle}"))
        flush(handle)

    def torn_save(content: Any, path: Any, *arguments: Any, **keywords: Any) -> None:
        save(content, path, *arguments, **keywords)
        size = os.path.getsize(path)
        if left[0] == 1 and any(word in str(path) for word in words):
            os.truncate(path, size // 2)  # as if it had been killed half way
        sys.audit("fsync", str(path))

    sys.addaudithook(watch)
    os.fsync, torch.save = watched_flush, torn_save


def kill_again_and_again(
    data: Path, folder: Path, kinds: list[str], chance: random.Random, seconds: float
) -> list[tuple[str, int, int | None]]:
    """Kill one run for each of the kinds.

    Args:
        data: what it trains on.
        folder: of the run.
        kinds: one of `KINDS` for each kill.
        chance: where randomness comes from.
        seconds: how long an uninterrupted run takes: kills by time come within a quarter of it.

    Returns:
        For each kill its kind, the step that the process began at, and the step of the newest whole
        checkpoint after it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["spattention.training.pretrain"])
    killed: list[tuple[str, int, int | None]] = []
    for kind in kinds:
        receiver, sender = context.Pipe(duplex=False)
        arguments = (data, folder, kind, chance.randrange(2**32), sender)
        process = context.Process(target=doomed, args=arguments)
        process.start()
        sender.close()
        began = receiver.recv()
        if kind == "time":
            process.join(chance.random() * seconds / 4)
            process.kill()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, f"{kind}: status {process.exitcode}"
        good, problems = newest_good(folder)
        assert not problems, "a kill leaves no checkpoint that looks whole and is not"
        step = None if good is None else step_of(good)
        assert (step or 0) >= began, "a checkpoint that was there stays there"
        read_metrics(folder / METRICS)
        killed.append((kind, began, step))
    return killed


def assert_same_run(folder: Path, whole: Path) -> None:
    """Losses, weights and optimizer to the last bit, and the same files."""
    assert losses(folder) == losses(whole)
    last = f"checkpoint-{CHANGES['steps']}"
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        assert (folder / last / name).read_bytes() == (whole / last / name).read_bytes(), name
    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}, "no leftovers"


def main() -> None:
    """Kill as often as asked, and print where."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    kinds = [KINDS[k % len(KINDS)] for k in range(options.kills)]
    chance.shuffle(kinds)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        data = write_data(path)
        began = os.times().elapsed
        pretrain(recipe(data, **CHANGES), path / "whole")
        seconds = os.times().elapsed - began
        for start in range(0, len(kinds), ROUND):
            part, number = kinds[start : start + ROUND], start // ROUND
            folder = path / f"run-{number}"
            for kind, first, step in kill_again_and_again(data, folder, part, chance, seconds):
                print(f"run {number}: began at {first}, killed by {kind}, checkpoint {step}")
            assert pretrain(recipe(data, **CHANGES), folder).finished
            assert_same_run(folder, path / "whole")
            print(f"run {number}: {len(losses(folder))} losses equal the uninterrupted run's")
    print(f"{options.kills} kills: {dict(Counter(kinds))}; all runs equal to the last bit")


if __name__ == "__main__":
    main()
