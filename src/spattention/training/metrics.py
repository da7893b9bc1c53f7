"""`metrics.jsonl`: one JSON object for each log of a run, with the step it belongs to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..files import naming, shown, write_atomically

METRICS = "metrics.jsonl"
LINE_BYTES = 2**20
LOSSES = ("loss", "eval_loss")  # a step has one of each at most
SUMMARY = "train_runtime"  # of an entry at the end of training, which a finished run may repeat


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a `metrics.jsonl`, without a last one that was cut off by a kill.

    Raises:
        ValueError: for any other line that is no entry, comes before an earlier step, or gives a
            loss of its step again; the message names file and line.
    """
    if not path.exists():
        return []
    found: list[dict[str, Any]] = []
    lines: dict[tuple[int, str], int] = {}  # of the losses so far
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LINE_BYTES):
            number += 1
            entry = _entry(line)
            if entry is not None:
                broken = _broken_rule(entry, found, lines)
                if broken:
                    raise ValueError(
                        f"{path}, line {number}, {broken}: remove that line to continue without it"
                    )
                found.append(entry)
                lines.update({(entry["step"], name): number for name in LOSSES if name in entry})
            elif line.endswith(b"\n") or len(line) == LINE_BYTES:
                raise ValueError(
                    f"{path}, line {number}, must be a JSON object with an integer `step`, got "
                    f"{shown(line[:100].decode(errors='replace').strip())}: remove that line to "
                    "continue without it"
                )
    return found


def write_metrics(path: Path, entries: list[dict[str, Any]]) -> None:
    """Replace the file by these entries."""
    write_atomically(path, "".join(json.dumps(entry) + "\n" for entry in entries))


def append_metrics(path: Path, entry: dict[str, Any]) -> None:
    """Add one entry."""
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def sync_metrics(path: Path) -> None:
    """Flush the file to disk."""
    with naming(path), path.open("a") as file:
        os.fsync(file.fileno())


def _broken_rule(
    entry: dict[str, Any], before: list[dict[str, Any]], lines: dict[tuple[int, str], int]
) -> str | None:
    """The rule that an entry breaks after those before it, and what it has; None for none."""
    step = entry["step"]
    names = [*LOSSES, SUMMARY]
    values = [entry[name] for name in names if name in entry]
    if not values or not all(type(value) in (int, float) for value in values):
        return f"must hold one of {names}, a number, got {shown(entry)}"
    if before and step < before[-1]["step"]:
        return f"must not have a step before {before[-1]['step']}, the one above it, got {step}"
    for name in LOSSES:
        if name in entry and (step, name) in lines:
            first = lines[step, name]
            return f"must not hold `{name}` of step {step} again, which is in line {first}"
    return None


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    good = isinstance(entry, dict) and type(entry.get("step")) is int and entry["step"] >= 0
    return entry if good else None
