"""What `mqar.py` found: a table, and accuracy by distance, for each setting."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from spattention.files import write_atomically
from spattention.markdown import table
from spattention.plots import picture_of

from .figures import styles_of
from .mqar import FIRST, LEARNED, SETTINGS, SOLVED, Setting
from .trained_recall import FORMAT

Entry = dict[str, Any]
Runs = dict[str, list[Entry]]  # by attention, in the order of the setting; by seed
EDGES = (0, 32, 128, 512, 2048, 8192)  # tokens: columns of the table


def read(ledger: Path, name: str) -> Runs:
    """The entries of a setting; all must be of one experiment."""
    entries = [json.loads(path.read_text()) for path in sorted((ledger / name).glob("*.json"))]
    kinds = {
        (e["format"], e["count"], e["steps"], str(e["model"] | e["training"])) for e in entries
    }
    if len(kinds) > 1 or any(entry["format"] != FORMAT for entry in entries):
        raise ValueError(f"entries of {ledger / name} must be of one experiment, got {kinds}")
    found: Runs = {attention: [] for attention in SETTINGS[name].attention()}
    for entry in sorted(entries, key=lambda entry: entry["seed"]):
        found.setdefault(entry["attention"], []).append(entry)
    return found


def sections(ledger: Path, images: Path) -> list[str]:
    """One section for each setting, also where nothing was run."""
    return [section(ledger, name, images) for name in SETTINGS]


def section(ledger: Path, name: str, images: Path) -> str:
    """Table, picture, and what was not run."""
    setting, runs = SETTINGS[name], read(ledger, name)
    lines = [
        f"## Associative recall over {setting.length:,} tokens"
        + ("" if setting.start_steps else ", from fresh weights"),
        "",
        f"`mqar.py {name}`: {setting.layers} layers, width {setting.width}, {setting.heads} heads; "
        f"{setting.count} keys with a value each, and then the keys again; up to {setting.steps:,} "
        f"steps of {setting.tokens:,} tokens, learning rate {setting.learning_rate:g}. "
        f"{_start(setting)} Sequences double once their loss is below {LEARNED} nats, at the "
        f"latest after {setting.patience:.0%} of the steps: *whole length from* is the first step "
        f"that has all {setting.length:,} tokens. *Steps* are those to {SOLVED:.1%} of the values, "
        f"or all. Guessing one of the values shown is right in {1 / setting.count:.4f}.",
        "",
    ]
    done = {attention: whole(entries) for attention, entries in runs.items() if entries}
    if done:
        edges = [edge for edge in EDGES if edge < setting.length] + [setting.length]
        headings = ["attention", "pairs, dense = 1", "accuracy"]
        headings += [f"{near:,} to {far:,}" for near, far in zip(edges, edges[1:])]
        headings += ["whole length from", "steps", "seeds"]
        cells = [row(attention, entries, edges) for attention, entries in done.items()]
        lines += [
            "Accuracy, also by the distance of the value in tokens.",
            "",
            *table(headings, cells, numbers=True),
            "",
        ]
        picture = picture_of(figure(done), 130, metadata={"Software": None})
        write_atomically(images / f"{name}.png", picture)
        lines += [f"![accuracy by distance](images/{name}.png)", ""]
    stopped = [
        f"{entry['attention']}, seed {entry['seed']} (stopped at step {entry['step']:,})"
        for entries in runs.values()
        for entry in entries
        if not entry["finished"]
    ]
    missing = [attention for attention, entries in runs.items() if not entries]
    absent = "; ".join([*stopped, *missing])
    lines += [f"Not run yet: {absent}." if absent else "Everything planned was run.", ""]
    return "\n".join(lines)


def _start(setting: Setting) -> str:
    if setting.start_steps:
        return (
            "With each seed all start from the same weights, with which dense attention has "
            f"learned {FIRST} keys, {4 * FIRST} tokens."
        )
    return f"All start from fresh weights and {FIRST} keys, {4 * FIRST} tokens."


def whole(entries: Sequence[Entry]) -> list[Entry]:
    """The finished runs, beside which a stopped one would stand for less training; all of them
    where none is finished.
    """
    return [entry for entry in entries if entry["finished"]] or list(entries)


def row(attention: str, entries: Sequence[Entry], edges: Sequence[int]) -> list[str]:
    """A row of the table."""
    right = [entry["accuracy"]["mean"] for entry in entries]
    parts = [part for entry in entries for part in entry["by_distance"]]
    spans = []
    for near, far in zip(edges, edges[1:]):
        here = [part for part in parts if near <= part["distance"] < far]
        asked = sum(part["asked"] for part in here)
        hits = sum(part["accuracy"] * part["asked"] for part in here)
        spans.append(f"{hits / asked:.3f}" if asked else "")
    whole = [entry["grown"][-1] if entry["grown"] else None for entry in entries]
    first = [
        str(grown["step"]) if grown and grown["count"] == entry["count"] else "never"
        for grown, entry in zip(whole, entries)
    ]
    return [
        attention,
        f"{entries[0]['pairs']:.2f}",
        f"{mean(right):.3f}" + (f" ± {stdev(right):.3f}" if len(right) > 1 else ""),
        *spans,
        ", ".join(first),
        ", ".join(f"{entry['step']:,}" for entry in entries),
        str(len(entries)),
    ]


def figure(runs: Runs) -> Figure:
    """Accuracy against distance, the mean over seeds."""
    found = Figure(figsize=(9, 4.5), layout="constrained")
    axis = found.subplots()
    styles = styles_of(runs)
    for attention, entries in runs.items():
        parts: dict[int, list[dict[str, float]]] = {}
        for part in (part for entry in entries for part in entry["by_distance"]):
            parts.setdefault(int(part["distance"]), []).append(part)
        places = sorted(parts)
        values = [
            sum(part["accuracy"] * part["asked"] for part in parts[place])
            / sum(part["asked"] for part in parts[place])
            for place in places
        ]
        axis.plot(places, values, marker="o", markersize=3, label=attention, **styles[attention])
    axis.set_xscale("log", base=2)
    axis.set(
        xlabel="distance of the value (tokens)",
        ylabel="accuracy",
        title="accuracy by distance, mean over seeds",
        ylim=(-0.02, 1.02),
    )
    axis.title.set_fontsize(10)
    axis.spines[["top", "right"]].set_visible(False)
    found.legend(fontsize=7, frameon=False, loc="outside right upper")
    return found
