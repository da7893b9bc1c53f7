"""A small run, and ways to kill it: imported once, by a server that forks a process for each."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import torch

from spattention.data.token_file import write_token_file
from spattention.data.tokens import TokenStream
from spattention.training import callbacks, checkpoints, metrics, pretrain
from spattention.training.recipe import Recipe, recipe_from

STEPS = 8


def write_data(folder: Path, documents: int = 11) -> Path:
    """Random documents of 40 tokens. Of eleven, windows of 32 tokens enter a second epoch within
    eight steps of two.
    """
    path = folder / "a.u16.xz"
    random = np.random.default_rng(0)
    made = [np.append(random.integers(8, 320, 39), 7) for _ in range(documents)]
    write_token_file(path, TokenStream.from_documents([m.astype(np.uint16) for m in made]), 7)
    return path


def recipe(data: Path, **changes: object) -> Recipe:
    """Eight steps on the data, a checkpoint every two."""
    values = {
        "model": "olmoe-tiny",
        "layers": 1,
        "vocabulary": 320,
        "data": str(data),
        "context": 32,
        "steps": STEPS,
        "batch": 2,
        "learning_rate": 1e-2,
        "warmup": 2,
        "precision": "float32",
        "loss": "plain",
        "threads": 1,
        "log_every": 1,
        "evaluate_every": 4,
        "validation_windows": 2,
        "save_every": 2,
        "tensorboard": False,
    }
    found = values | changes
    return recipe_from({name: value for name, value in found.items() if value is not None})


def losses(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of a run, and its validation losses after them."""
    entries = metrics.read_metrics(folder / metrics.METRICS)
    found = [(e["step"], e[name]) for name in ("loss", "eval_loss") for e in entries if name in e]
    return found


def killed(data: Path, folder: Path, where: str, changes: dict[str, object]) -> None:
    """Run until the process kills itself: no handler, no `finally`, nothing flushed."""
    torch.set_num_threads(1)

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def at_second(function, before=None):  # type: ignore[no-untyped-def]
        calls = []

        def replaced(*arguments, **keywords):  # type: ignore[no-untyped-def]
            calls.append(0)
            if len(calls) == 2 and before:
                die()
            result = function(*arguments, **keywords)
            if len(calls) == 2:
                die()
            return result

        return replaced

    if where == "while the weights are written":
        torch.save = at_second(torch.save, before=True)
    elif where == "before the checkpoint is listed":
        callbacks.commit = at_second(callbacks.commit, before=True)
    elif where == "before it is renamed":
        Path.rename = at_second(Path.rename, before=True)  # type: ignore[method-assign]
    elif where == "before old ones are removed":
        callbacks.rotate = at_second(callbacks.rotate, before=True)
    elif where == "between two steps":
        callbacks.MetricsCallback.on_step_end = lambda self, a, state, c, **k: (  # type: ignore[method-assign]
            die() if state.global_step == 5 else None
        )
    pretrain.pretrain(recipe(data, **changes), folder)


__all__ = ["STEPS", "checkpoints", "killed", "losses", "recipe", "write_data"]
