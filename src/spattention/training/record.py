"""`losses.json`: recipe, losses and circumstances of a run, to be kept beside the recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..files import read_json, shown, write_atomically
from ..provenance import machine, source_commit, versions
from .callbacks import Event, MetricsCallback

LOSSES = "losses.json"
RECORD_BYTES = 2**30
COLUMNS = {
    "train": ("step", "loss", "grad_norm", "tokens_per_second", "mfu", "balance_loss", "z_loss"),
    "validation": ("step", "eval_loss"),
}
LIBRARIES = ("torch", "transformers", "accelerate")


class RecordCallback(TrainerCallback):
    """Writes `losses.json` with each validation loss and checkpoint, and at the end.

    It must come after the callback that collects the metrics.

    What an earlier file says of steps that the metrics no longer have is kept.

    Args:
        recipe: of the run, as a dict.
        folder: of the run.
        metrics: what collects the losses.
        facts: what was said of the run when it began.
        command: the command line, if there was one.
    """

    def __init__(
        self,
        recipe: dict[str, Any],
        folder: Path,
        metrics: MetricsCallback,
        facts: Event,
        command: str | None,
    ) -> None:
        self.path = folder / LOSSES
        self.metrics = metrics
        self.earlier: dict[str, list[dict[str, Any]]] = {kind: [] for kind in COLUMNS}
        self.content = {
            "format": "spattention-run",
            "version": 1,
            "command": command,
            "commit": source_commit(),
            "recipe": recipe,
            "facts": {name: facts[name] for name in facts if name not in ("kind", "step")},
            "machine": machine(),
            "versions": versions(LIBRARIES),
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        found = read_record(self.path.parent) or {}
        for kind in self.earlier:
            entries = found.get(kind, [])
            self.earlier[kind] = [e for e in entries if e["step"] <= state.global_step]

    def _write(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        results: dict[str, Any] = {"step": state.global_step}
        for kind, columns in COLUMNS.items():
            now = [_rounded(e, columns) for e in self.metrics.entries if columns[1] in e]
            results[kind] = _joined(self.earlier[kind], now)
        write_atomically(self.path, json.dumps(self.content | results) + "\n")

    on_evaluate = on_save = on_train_end = _write


def read_record(folder: Path) -> dict[str, Any] | None:
    """The `losses.json` of a run; None without one.

    Raises:
        ValueError: if it is damaged or foreign; the message names it.
    """
    path = folder / LOSSES
    if not path.exists():
        return None
    found = read_json(path, RECORD_BYTES)
    step = found.get("step")
    if type(step) is not int or step < 0:
        raise ValueError(
            f"{path} must hold `step`, an integer from 0 on, as `spattention train` wrote it; got "
            f"{shown(step)}"
        )
    for kind in COLUMNS:
        entries = found.get(kind)
        if not isinstance(entries, list) or not all(
            isinstance(e, dict) and type(e.get("step")) is int for e in entries
        ):
            raise ValueError(
                f"{path} must hold `{kind}`, a list of objects with an integer `step`; got "
                f"{shown(entries)}"
            )
    return found


def recorded_step(folder: Path) -> int | None:
    """The step at which the `losses.json` in a folder was written; None without one."""
    found = read_record(folder)
    return None if found is None else found["step"]


def _joined(
    earlier: Iterable[dict[str, Any]], now: Iterable[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Entries of both by their steps; where both have one, the second counts."""
    found = {entry["step"]: entry for entry in (*earlier, *now)}
    return [found[step] for step in sorted(found)]


def _rounded(entry: dict[str, float], names: tuple[str, ...]) -> dict[str, float]:
    """The named values of an entry, rounded to six digits."""
    found = {name: entry[name] for name in names if name in entry}
    return {
        name: value if isinstance(value, int) or not math.isfinite(value) else float(f"{value:.6g}")
        for name, value in found.items()
    }
