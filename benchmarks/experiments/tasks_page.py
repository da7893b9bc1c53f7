"""What `tasks.py` found, as a table of the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from spattention.markdown import table

from .ledger import read_entry
from .tasks import ENTRIES, FORMAT

Entry = dict[str, Any]
Score = dict[str, Any]
# One column per task: the metric that is usual for it, and the examples in the prompt.
SHOWN = {
    "HellaSwag": ("hellaswag", "acc_norm", 0),
    "WinoGrande": ("winogrande", "acc", 0),
    "COPA": ("copa", "acc", 0),
    "PIQA": ("piqa", "acc_norm", 0),
    "ARC easy": ("arc_easy", "acc_norm", 0),
    "ARC challenge": ("arc_challenge", "acc_norm", 0),
    "LAMBADA": ("lambada_openai", "acc", 0),
    "MMLU": ("mmlu", "acc", 0),
    "MMLU, 5 shots": ("mmlu", "acc", 5),
}


def section(ledger: Path, plan: str, rows: Sequence[str]) -> list[str]:
    """The table of a plan's runs, in the order of `rows`; empty if no tasks were run."""
    files = sorted((ledger / plan / ENTRIES).glob("*.json"))
    entries = [entry for file in files if (entry := read_entry(file, FORMAT))]
    by_label: dict[str, list[Entry]] = {label: [] for label in rows}
    for entry in entries:
        if entry["limit"] is not None:
            raise ValueError(f"tasks of {plan} must be of all items, got limit {entry['limit']}")
        by_label.setdefault(entry["label"], []).append(entry)
    if not entries:
        return []
    lines = [
        "Accuracy on tasks in per cent (`tasks.py`), means over seeds, with the standard error",
        "over the items of one model, and behind the comma the standard deviation over seeds; *~*:",
        "near chance, no model is above it by two standard errors.",
        "",
    ]
    cells = [
        [label, *(_cell(found, *which) for which in SHOWN.values()), str(len(found))]
        for label, found in by_label.items()
        if found
    ]
    cells.append(["*chance*", *(_chance(entries, *which) for which in SHOWN.values()), ""])
    return [*lines, *table(["attention", *SHOWN, "seeds"], cells, numbers=True), ""]


def _scores(entries: Sequence[Entry], task: str, metric: str, shots: int) -> list[Score]:
    return [
        score
        for entry in entries
        for score in entry["scores"]
        if (score["task"], score["metric"], score["shots"]) == (task, metric, shots)
    ]


def _cell(entries: Sequence[Entry], task: str, metric: str, shots: int) -> str:
    scores = _scores(entries, task, metric, shots)
    if not scores:
        return ""
    values = [100 * score["value"]["mean"] for score in scores]
    error = 100 * mean(score["value"]["error"] for score in scores)
    spread = f", {stdev(values):.1f}" if len(values) > 1 else ""
    near = "~ " if all(score["near_chance"] for score in scores) else ""
    return f"{near}{mean(values):.1f} ± {error:.1f}{spread}"


def _chance(entries: Sequence[Entry], task: str, metric: str, shots: int) -> str:
    scores = _scores(entries, task, metric, shots)
    return f"{100 * scores[0]['chance']:.1f}" if scores else ""
