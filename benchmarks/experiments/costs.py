"""What the rows of a plan cost, measured apart from their runs: a training step on a GPU that does
nothing else meanwhile, and the memory that it takes. Runs side by side say nothing about that.

    python -m benchmarks.experiments.costs benchmarks/experiments/plans/related-2048.toml \
        --data streams

A row is a file of its own, ledger/<plan>/costs/<run>.json, written as soon as it is measured; what
has one is not measured again. A step is that of `spattention train`: passes, clipping, AdamW.
Bytes of caches are in the entries of the runs (`cache_after`), since they depend on no GPU.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from spattention import hf
from spattention.benchmarking.timing import cache_bytes, synchronize
from spattention.comparison.plan import Plan, Run
from spattention.data.training import TrainingData, open_training
from spattention.files import write_atomically
from spattention.provenance import source_commit, versions
from spattention.training.load import load_model
from spattention.training.pretrain import prepare_model
from spattention.training.recipe import Recipe

from ..training import run_pass
from .ledger import HERE, entry_path
from .plan_files import chosen, read_plan

FORMAT = "spattention-costs"
COSTS = "costs"  # below the folder of the plan
WARM_UP = 5  # steps: they compile, tune, and allocate
LIBRARIES = ("torch", "transformers", "triton")


@dataclass(frozen=True)
class Options:
    """Time a training step of every row of plans, one after another.

    Args:
        plans: TOML files, see plan.py.
        data: Folder of the token files that plans name.
        ledger: Folder of the entries; files go below the plan's folder in it.
        only: Labels or names (`LABEL-seedN`) of runs, of those in the plans; all without it.
        set: Changes to the recipes, as in steps=100.
        repeats: Timed steps.
        minutes: Begin no row after so long; None: never.
        commit: The commit to record, where git cannot tell.
    """

    plans: tyro.conf.Positional[tuple[Path, ...]]
    data: Path = Path("data")
    ledger: Path = HERE
    only: tuple[str, ...] = ()
    set: tuple[str, ...] = ()
    repeats: int = 20
    minutes: float | None = None
    commit: str | None = None


def main(options: Options) -> bool:
    """Whether every row was measured. One that fails does not keep the others from it."""
    commit = options.commit or source_commit() or "unknown"
    plans = [read_plan(path, options.set) for path in options.plans]
    until = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    failed = []
    for plan, run in _first_seeds(chosen(plans, options.only)):
        path = _path(options.ledger, plan, run)
        if path.exists():
            continue
        if until is not None and time.monotonic() >= until:
            print(f"out of time at {plan.name}/{run.label}")
            return False
        try:
            found = measure(run.recipe, _text(run, options.data), options.repeats)
        except Exception:
            traceback.print_exc()
            failed.append(f"{plan.name}/{run.label}")
            continue
        finally:
            gc.collect()
            torch._dynamo.reset()
            torch.cuda.empty_cache()
        content = {
            "format": FORMAT,
            "version": 1,
            "plan": plan.name,
            "label": run.label,
            "commit": commit,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "versions": versions(LIBRARIES),
            "tokens": run.recipe.batch * run.recipe.context,
            **found,
        }
        write_atomically(path, json.dumps(content, indent=1) + "\n")
        print(f"{plan.name}/{run.label}: {1e3 * found['seconds']:.1f} ms a step", flush=True)
    print(f"failed: {', '.join(failed)}" if failed else "every row is measured")
    return not failed


def measure(recipe: Recipe, data: TrainingData, repeats: int) -> dict[str, Any]:
    """Seconds of a training step, median and each; and the most memory of one, None on a CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    passes = recipe.passes(1)
    torch.manual_seed(0)
    model, _ = load_model(recipe, data, device)
    own = prepare_model(recipe, model, passes, device)
    optimizer = own or torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate)
    model.train()
    rows = recipe.batch // passes
    size = model.config.get_text_config().vocab_size
    batch = torch.randint(size, (rows, recipe.context), device=device)
    items = torch.tensor(batch.numel() * passes, device=device)
    inputs = {"input_ids": batch, "labels": batch, "num_items_in_batch": items}
    seconds = []
    for index in range(WARM_UP + repeats):
        if index == WARM_UP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        synchronize(device)
        began = time.perf_counter()
        for _ in range(passes):
            run_pass(model, inputs)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        model.zero_grad()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    timed = seconds[WARM_UP:]
    return {
        "seconds": statistics.median(timed),
        "all_seconds": timed,
        "peak_memory": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }


def cache_after(model: Any, tokens: Tensor) -> int:
    """Bytes of what a model keeps of a text `[1, N]`, in the cache that `generate` gives it."""
    config = model.config
    banded = getattr(config.get_text_config(), "spattention", None) is not None
    with torch.no_grad():
        found = model(
            input_ids=tokens.to(model.device),
            past_key_values=hf.BandCache(config) if banded else None,
            use_cache=True,
            logits_to_keep=1,
        )
    return cache_bytes(found.past_key_values)


def read_costs(ledger: Path, plan: str) -> dict[str, dict[str, Any]]:
    """What was measured for a plan, by label, each with `over_dense`: its seconds over those of
    dense attention at the same commit, or None if there dense attention was not measured.

    Raises:
        ValueError: if files are of another kind, or of two GPUs.
    """
    found: dict[str, dict[str, Any]] = {}
    dense: dict[str, float] = {}
    for path in sorted((ledger / plan / COSTS).glob("*.json"), key=lambda each: each.stem):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("format") != FORMAT or content.get("version") != 1:
            raise ValueError(f"{path} must be of format {FORMAT}, version 1")
        if content["label"] == "dense":
            dense[content["commit"]] = content["seconds"]
        found.setdefault(content["label"], content)
    for content in found.values():
        base = dense.get(content["commit"])
        content["over_dense"] = None if base is None else content["seconds"] / base
    gpus = {content["gpu"] for content in found.values()}
    if len(gpus) > 1:
        raise ValueError(f"costs of {plan} must be of one GPU, got {sorted(map(str, gpus))}")
    return found


def _first_seeds(jobs: list[tuple[Plan, Run]]) -> list[tuple[Plan, Run]]:
    """One run of each label: seeds cost the same."""
    found: dict[tuple[str, str], tuple[Plan, Run]] = {}
    for plan, run in jobs:
        found.setdefault((plan.name, run.label), (plan, run))
    return list(found.values())


def _path(ledger: Path, plan: Plan, run: Run) -> Path:
    return entry_path(ledger / plan.name, COSTS, run.name.removesuffix(f"-seed{run.seed}"))


def _text(run: Run, folder: Path) -> TrainingData:
    recipe = run.recipe
    paths = [str(folder / path) for path in recipe.validation]
    return open_training(
        paths, paths, context=recipe.context, end_of_text=recipe.end_of_text, limit=1
    )


if __name__ == "__main__":
    sys.exit(0 if main(tyro.cli(Options)) else 3)
