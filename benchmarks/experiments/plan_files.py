"""Plans of training runs, each in one TOML file.

title = "what is compared"
seeds = [0]

[recipe]                     # fields of `training.recipe.Recipe`, the same for all
model = "small-512"

[[run]]                      # in the order in which they are made, seed by seed
attention = "dense"

[[run]]
attention = ["dense", "shared_local"]    # one per layer
label = "first layer dense"
sinks = true                             # any field of the recipe may be changed for a run
seeds = [0, 1, 2]                        # instead of the plan's
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path

from spattention.comparison.plan import Plan, Run
from spattention.training.recipe import read_change


def read_plan(path: Path, changes: Sequence[str] = ()) -> Plan:
    """The plan in a file, with changes to its recipe as `training.recipe.read_recipe`
    takes them.

    Raises:
        ValueError: for unknown entries, runs of one name, or a field that is no recipe's.
    """
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    known = {"title", "seeds", "recipe", "run"}
    if not known >= values.keys() or not values.get("run"):
        raise ValueError(f"{path} must have entries of {sorted(known)} and at least one run")
    shared = dict(values.get("recipe", {}))
    for change in changes:
        name, value = read_change(change)
        shared[name] = value
    rounds: list[list[Run]] = []
    for entry in values["run"]:
        entry = dict(entry)
        seeds = entry.pop("seeds", values.get("seeds", [0]))
        attention = entry["attention"]
        default = attention if isinstance(attention, str) else "+".join(dict.fromkeys(attention))
        label = entry.pop("label", default)
        for number, seed in enumerate(seeds):
            rounds += [[]] if number >= len(rounds) else []
            rounds[number].append(Run(label, seed, {**shared, **entry, "seed": seed}))
    runs = tuple(run for each in rounds for run in each)
    plan = Plan(path.stem, values["title"], runs)
    names = [run.name for run in runs]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{path} must name each run once; give a `label` to tell apart {twice}")
    for run in runs:
        if not run.fields.get("validation"):
            raise ValueError(f"{path} must name `validation` data, got none for {run.name}")
        _ = run.recipe  # what is wrong is known before the first run begins
    return plan


def chosen(plans: Sequence[Plan], only: Sequence[str]) -> list[tuple[Plan, Run]]:
    """The runs of plans, in order; with `only`, those whose label or name it holds.

    Raises:
        ValueError: if `only` names what no plan has.
    """
    labels = {label for plan in plans for run in plan.runs for label in (run.label, run.name)}
    if unknown := sorted(set(only) - labels):
        raise ValueError(f"`--only` must name runs of the plans, {sorted(labels)}, got {unknown}")
    return [
        (plan, run)
        for plan in plans
        for run in plan.runs
        if not only or {run.label, run.name} & set(only)
    ]
