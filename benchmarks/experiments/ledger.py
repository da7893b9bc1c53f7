"""The ledger: one JSON per run, written when the run ends or stops, and committed.

ledger/<plan>/<run>.json
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spattention.comparison.plan import Run
from spattention.files import write_atomically
from spattention.training.recipe import FREE

FORMAT = "spattention-experiment"
HERE = Path(__file__).parent / "ledger"
# Where a run was made, not what it was.
PLACES = ("data", "validation")


def entry_path(ledger: Path, plan: str, run: str) -> Path:
    """Where the entry of a run lies."""
    return ledger / plan / f"{run}.json"


def read_entry(path: Path, kind: str = FORMAT) -> dict[str, Any] | None:
    """An entry; None if there is none yet. Raises `ValueError` for a file of another kind."""
    if not path.exists():
        return None
    entry = json.loads(path.read_text(encoding="utf-8"))
    if entry.get("format") != kind or entry.get("version") != 1:
        raise ValueError(f"{path} must be of format {kind}, version 1")
    return entry


def write_entry(path: Path, entry: dict[str, Any]) -> None:
    """Write an entry, atomically."""
    content = {"format": FORMAT, "version": 1, **entry}
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def finished(entry: dict[str, Any] | None) -> bool:
    """Whether the run came to its end."""
    return entry is not None and entry["step"] == entry["recipe"]["steps"]


def check_same(path: Path, entry: dict[str, Any], recipe: dict[str, Any]) -> None:
    """An entry of this name must be of this configuration; raises `ValueError`. Fields that do not
    change what is computed may differ, such as those that recipes did not have at the time.
    """
    different = [
        f"{name} was {entry['recipe'].get(name)!r}, now {recipe[name]!r}"
        for name in recipe
        if name not in FREE and recipe[name] != entry["recipe"].get(name)
    ]
    if different:
        raise ValueError(
            f"{path} is of another configuration ({'; '.join(different)}): give the plan another "
            "name, or remove the entry"
        )


def read_ledger(ledger: Path, plan: str) -> list[dict[str, Any]]:
    """All entries of a plan, by name; their runs must have had equal data, seed by seed."""
    entries = [read_entry(path) for path in sorted((ledger / plan).glob("*.json"))]
    found = [entry for entry in entries if entry is not None]
    digests = {entry["data"] for entry in found}
    if len(digests) > 1:
        raise ValueError(f"runs of {plan} must have had the same data, got {sorted(digests)}")
    return found


def same_runs(ledger: Path, runs: Sequence[Run], entries: Sequence[dict[str, Any]]) -> list[Any]:
    """Finished entries of other plans that are of these runs: of the same recipe, data and seed.

    Args:
        ledger: folder of the entries.
        runs: what is looked for.
        entries: of the plan itself, which name the data; none is found without any.

    Returns:
        The entries, with the labels of the runs.
    """
    digests = {entry["data"] for entry in entries}
    plans = {entry["plan"] for entry in entries}
    wanted = {json.dumps(_computed(run.recipe.to_dict()), sort_keys=True): run for run in runs}
    found: dict[str, Any] = {}
    for path in sorted(ledger.glob("*/*.json")):
        entry = json.loads(path.read_text(encoding="utf-8"))
        if entry.get("format") != FORMAT or not finished(entry) or entry["plan"] in plans:
            continue
        if entry["data"] not in digests:
            continue
        key = json.dumps(_computed(entry["recipe"]), sort_keys=True)
        if key in wanted:
            found.setdefault(key, entry | {"label": wanted[key].label})
    return list(found.values())


def _computed(recipe: dict[str, Any]) -> dict[str, Any]:
    """What decides the losses of a recipe; fields that it does not have are None."""
    return {k: v for k, v in recipe.items() if k not in FREE and v is not None}
