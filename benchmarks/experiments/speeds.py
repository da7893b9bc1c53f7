"""How fast the models of a plan train, measured apart from its runs: all in turns in one model on a
GPU alone, dense attention with the faster of PyTorch's kernels. Files of `benchmarks/training.py`,
one per kernel of dense attention, lie in ledger/<plan>/speeds.

    python -m benchmarks.training --model small-512 --layers 8 --length 2048 --tokens 32768 \
        --passes 1 --repeats 15 --loss chunked --dense cudnn --patterns sliding_window \
        --output benchmarks/experiments/ledger/finalists-2048/speeds/cudnn.json
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

from spattention.choice import STOCK
from spattention.comparison.plan import Plan

SPEEDS = "speeds"  # below the folder of the plan


@dataclass(frozen=True)
class Speeds:
    """What was measured.

    Attributes:
        gpu: its name.
        dense: which kernel was the fastest one.
        commits: of the code.
        rates: tokens per second by attention, that of dense attention with its fastest kernel.
        spread: how far the quartiles of one attention's steps lie apart, over their median, at
            most. A host stops for a moment now and then, which tells nothing of the attention.
    """

    gpu: str
    dense: str
    commits: tuple[str, ...]
    rates: dict[str, float]
    spread: float

    def put(self, done: dict[tuple[str, int], dict[str, Any]]) -> dict[tuple[str, int], Any]:
        """The entries with these speeds in place of those of their runs."""
        return {
            (label, seed): entry | {"gpu": self.gpu, "speed": self.rates.get(label)}
            for (label, seed), entry in done.items()
        }

    def line(self) -> str:
        """For readers."""
        return (
            "- Speeds are of full training steps, in turns on one GPU "
            f"({', '.join(commit[:7] for commit in self.commits)}); dense attention is that of "
            f"{self.dense}. The middle half of one attention's steps spans up to "
            f"{100 * self.spread:.0f} % of their median."
        )


def read_speeds(ledger: Path, plan: Plan) -> Speeds | None:
    """What was measured for a plan; None if nothing was.

    Raises:
        ValueError: if files are of another model or length, of two GPUs, or without dense
            attention.
    """
    parts = [
        json.loads(p.read_text()) for p in sorted((ledger / plan.name / SPEEDS).glob("*.json"))
    ]
    if not parts:
        return None
    fields = plan.runs[0].fields
    wanted = (fields["model"], fields["context"])
    kinds = {(part["settings"]["model"], part["settings"]["length"]) for part in parts}
    if kinds != {wanted}:
        raise ValueError(f"speeds of {plan.name} must be of {wanted}, got {sorted(kinds)}")
    gpus = {part["environment"]["gpu"] for part in parts}
    if len(gpus) != 1:
        raise ValueError(f"speeds of {plan.name} must be of one GPU, got {sorted(gpus)}")
    rates: dict[str, float] = {}
    dense = []
    rows = [row for part in parts for row in part["rows"]]
    for row in rows:
        kernel = row["attention"].removeprefix(f"{STOCK} ")
        if kernel != row["attention"]:
            dense.append((row["tokens_per_second"], kernel))
        else:
            rates[kernel] = row["tokens_per_second"]
    if not dense:
        raise ValueError(f"speeds of {plan.name} must be of dense attention too, got {list(rates)}")
    rates[STOCK], kernel = max(dense)
    commits = tuple(dict.fromkeys(part["environment"]["commit"] for part in parts))
    spread = max(_quartiles_apart(row["all_seconds"]) for row in rows)
    return Speeds(gpus.pop(), kernel, commits, rates, spread)


def _quartiles_apart(seconds: Sequence[float]) -> float:
    first, median, third = quantiles(seconds, n=4)
    return (third - first) / median
