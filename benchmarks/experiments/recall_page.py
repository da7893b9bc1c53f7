"""What `trained_recall.py` found, as a section of the page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from spattention.files import write_atomically
from spattention.markdown import table
from spattention.plots import picture_of

from .figures import styles_of
from .trained_recall import ENTRIES, FORMAT, Options

Entry = dict[str, Any]
Runs = dict[str, list[Entry]]  # by attention, in the order of the command; by seed
PICTURE = "trained-recall.png"


def read(ledger: Path) -> Runs:
    """The entries there are; all must be of one experiment."""
    entries = [json.loads(path.read_text()) for path in sorted((ledger / ENTRIES).glob("*.json"))]
    kinds = {
        (e["format"], e["count"], e["steps"], str(e["model"] | e["training"])) for e in entries
    }
    if len(kinds) > 1 or any(entry["format"] != FORMAT for entry in entries):
        raise ValueError(f"entries of {ledger / ENTRIES} must be of one experiment, got {kinds}")
    found: Runs = {name: [] for name in Options.attention}
    for entry in sorted(entries, key=lambda entry: entry["seed"]):
        found.setdefault(entry["attention"], []).append(entry)
    return {name: runs for name, runs in found.items() if runs}


def learned(entry: Entry) -> int | None:
    """The first step in the log with less than half of the loss of guessing among all tokens."""
    half = math.log(4 * entry["count"]) / 2
    return next((line["step"] for line in entry["loss"] if line["loss"] < half), None)


def section(ledger: Path, images: Path) -> str:
    """The table and the picture; empty if nothing was run."""
    runs = read(ledger)
    if not runs:
        return ""
    one = next(iter(runs.values()))[0]
    picture = picture_of(figure(runs), 130, metadata={"Software": None})
    write_atomically(images / PICTURE, picture)
    model, training = one["model"], one["training"]
    lines = [
        "## Recall that models are trained for",
        "",
        f"`trained_recall.py`, on the CPU: {model['layers']} layers, width {model['width']}, "
        f"{model['heads']} heads of {model['head_dim']}; sequences of {one['count']} keys with a "
        f"value each and then the keys again, {4 * one['count']} tokens, fresh in each of "
        f"{one['steps']:,} steps of {training['batch']}, learning rate "
        f"{training['learning_rate']:g}. Guessing one of the values shown is right in "
        f"{one['chance']:.3f}. *Learned* is the step at which half of the loss is gone, seed by "
        "seed; *spread* the standard deviation over seeds.",
        "",
    ]
    cells = []
    for name, entries in runs.items():
        right = [entry["accuracy"]["mean"] for entry in entries]
        spread = f"{stdev(right):.3f}" if len(right) > 1 else "?"
        steps = ", ".join(str(learned(entry) or "never") for entry in entries)
        pairs = f"{entries[0]['pairs']:.2f}"
        cells.append([name, pairs, f"{mean(right):.3f}", spread, steps, str(len(entries))])
    headings = ["attention", "pairs, dense = 1", "accuracy", "spread", "learned at step", "seeds"]
    lines += table(headings, cells, numbers=True)
    return "\n".join([*lines, "", f"![accuracy by distance](images/{PICTURE})", ""])


def figure(runs: Runs) -> Figure:
    """Loss against steps, every seed, and accuracy against distance, the mean over seeds."""
    found = Figure(figsize=(11, 4.5), layout="constrained")
    losses, distances = found.subplots(1, 2)
    styles = styles_of(runs)
    for name, entries in runs.items():
        for entry in entries:
            steps, values = zip(*((line["step"], line["loss"]) for line in entry["loss"]))
            losses.plot(steps, values, linewidth=1, alpha=0.7, **styles[name])
        hits: dict[int, float] = {}
        asked: dict[int, int] = {}
        for part in (part for entry in entries for part in entry["by_distance"]):
            place = part["distance"] // 4 * 4 + 2  # some distances are rare
            hits[place] = hits.get(place, 0.0) + part["accuracy"] * part["asked"]
            asked[place] = asked.get(place, 0) + part["asked"]
        places = sorted(hits)
        distances.plot(
            places,
            [hits[p] / asked[p] for p in places],
            marker="o",
            markersize=3,
            label=name,
            **styles[name],
        )
    losses.set(xlabel="steps", ylabel="loss (nats per value)", title="every seed", ylim=(0, None))
    distances.set(
        xlabel="distance of the value (tokens)",
        ylabel="accuracy",
        title="accuracy by distance, mean over seeds",
        ylim=(-0.02, 1.02),
    )
    for axis in (losses, distances):
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(10)
    found.legend(fontsize=7, frameon=False, loc="outside right upper")
    return found
