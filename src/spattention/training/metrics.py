"""`metrics.jsonl`: one JSON object for each log of a run, with the step it belongs to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..files import naming, shown, write_atomically

METRICS = "metrics.jsonl"
LINE_BYTES = 2**20


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a `metrics.jsonl`, without a last one that was cut off by a kill.

    Raises:
        ValueError: for any other line that is no entry; the message names file and line.
    """
    if not path.exists():
        return []
    found = []
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LINE_BYTES):
            number += 1
            entry = _entry(line)
            if entry is not None:
                found.append(entry)
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


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    good = isinstance(entry, dict) and type(entry.get("step")) is int and entry["step"] >= 0
    return entry if good else None
