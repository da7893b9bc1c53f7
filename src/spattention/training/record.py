"""`losses.json`: a run's recipe, what it gave and on what, to be kept beside the recipe."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .. import __version__
from .callbacks import Event
from .report import machine
from .results import write_atomically
from .watch import METRICS, read_metrics

LOSSES = "losses.json"
COLUMNS = ("step", "loss", "grad_norm", "tokens_per_second", "mfu", "balance_loss", "z_loss")
LIBRARIES = ("torch", "transformers", "accelerate")


class Record(TrainerCallback):
    """Writes the file with each validation loss and each checkpoint and at the end, so that a run
    that is killed leaves it too. It must come after the callback that writes the metrics.

    Args:
        recipe: of the run, as a dict.
        folder: of the run, with its metrics.
        facts: what was said of it when it began.
        command: the command line, if there was one.
    """

    def __init__(
        self, recipe: dict[str, Any], folder: Path, facts: Event, command: str | None
    ) -> None:
        self.path = folder / LOSSES
        self.metrics = folder / METRICS
        self.content = {
            "format": "spattention-run",
            "version": 1,
            "command": command,
            "commit": source_commit(),
            "recipe": recipe,
            "facts": {name: facts[name] for name in facts if name not in ("kind", "step")},
            "machine": machine(),
            "versions": {
                "python": platform.python_version(),
                "spattention": __version__,
                **{name: version(name) for name in LIBRARIES},
            },
        }

    def _write(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        entries = read_metrics(self.metrics)
        results = {
            "step": state.global_step,
            "train": [_rounded(e, COLUMNS) for e in entries if "loss" in e],
            "validation": [_rounded(e, ("step", "eval_loss")) for e in entries if "eval_loss" in e],
        }
        write_atomically(self.path, json.dumps(self.content | results) + "\n")

    on_evaluate = on_save = on_train_end = _write


def recorded_step(folder: Path) -> int | None:
    """How far the run that left its file in a folder had come; None without one."""
    path = folder / LOSSES
    return int(json.loads(path.read_text("utf-8"))["step"]) if path.exists() else None


def source_commit() -> str | None:
    """The git commit of the checkout that this package runs from; None where it is installed."""
    here = Path(__file__)

    def git(*command: str) -> str | None:
        try:
            found = subprocess.run(
                ["git", "-C", str(here.parent), *command],
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError:  # no git
            return None
        return found.stdout.strip() if found.returncode == 0 else None

    # An environment inside somebody's checkout is not this project's.
    return git("rev-parse", "HEAD") if git("ls-files", "--error-unmatch", here.name) else None


def _rounded(entry: dict[str, float], names: tuple[str, ...]) -> dict[str, float]:
    """Six digits say all that a loss can tell."""
    found = {name: entry[name] for name in names if name in entry}
    return {
        name: value if isinstance(value, int) or not math.isfinite(value) else float(f"{value:.6g}")
        for name, value in found.items()
    }
