"""Plans: lists of training runs that differ in attention and seed alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..training.recipe import Recipe, recipe_from


@dataclass(frozen=True)
class Run:
    """One training run of a plan.

    Attributes:
        label: how tables call it.
        seed: of weights and order of the data.
        fields: of the recipe; in a file, `data` and `validation` may be names in a folder that the
            runner is told.
    """

    label: str
    seed: int
    fields: dict[str, Any]

    @property
    def name(self) -> str:
        """Unique in its plan, and fit for a file's name."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{self.label}-seed{self.seed}")

    @property
    def recipe(self) -> Recipe:
        """The recipe of its fields; ValueError for a field that is no recipe's or out of range."""
        return recipe_from(self.fields)


@dataclass(frozen=True)
class Plan:
    """Runs that are compared.

    Attributes:
        name: the file's.
        title: one line for readers.
        runs: in order: all first seeds, then all second ones, so that an interruption leaves whole
            comparisons.
    """

    name: str
    title: str
    runs: tuple[Run, ...]


def plan_of(
    title: str, shared: dict[str, Any], attention: Sequence[str], seeds: Sequence[int]
) -> Plan:
    """Every attention with every seed, on the same fields otherwise; all first seeds first."""
    runs = (
        Run(name, seed, {**shared, "attention": name, "seed": seed})
        for seed in seeds
        for name in attention
    )
    return Plan("compare", title, tuple(runs))
