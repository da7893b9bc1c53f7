"""Tasks of the lm-evaluation-harness on the models that `run.py` trained, into the ledger.

    python -m benchmarks.experiments.tasks benchmarks/experiments/plans/finalists-2048.toml \
        --items evals --tokenizer tokenizer.json

Models are taken from the work folder of `run.py`. What is in the ledger is not made again, so that
the same command goes on after an interruption.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from spattention import baselines, hf
from spattention.comparison.plan import Plan, Run
from spattention.evaluation.tasks import LOCAL, MMLU, run_tasks
from spattention.files import write_atomically
from spattention.provenance import machine, source_commit

from .ledger import HERE, read_entry
from .plan_files import chosen, read_plan

ENTRIES = "tasks"  # below the folder of the plan
FORMAT = "spattention-tasks"
END_OF_TEXT = "<|endoftext|>"
LIBRARIES = ("torch", "transformers", "lm_eval", "datasets")


@dataclass(frozen=True)
class Options:
    """Evaluate the trained models of plans on tasks; runs without a model are named and left out.

    Args:
        plans: TOML files, see plan.py.
        items: Folder of JSON lines with the items of the tasks.
        tokenizer: The JSON file of the tokenizer that the data of the plans were made with.
        tasks: Which; all that have local items without it.
        shots: Numbers of examples in the prompt for mmlu; the others have none.
        work: Folder of models, that of run.py.
        ledger: Folder of the entries.
        only: Labels or names (`LABEL-seedN`) of the runs; all without it.
        batch: Sequences at a time.
        limit: Only so many items per task (per subject of mmlu), for a first look.
        commit: The commit to record, where git cannot tell.
    """

    plans: tyro.conf.Positional[tuple[Path, ...]]
    items: Path
    tokenizer: Path
    tasks: tuple[str, ...] = (*LOCAL, MMLU)
    shots: tuple[int, ...] = (0, 5)
    work: Path = Path("runs/experiments")
    ledger: Path = HERE
    only: tuple[str, ...] = ()
    batch: int = 64
    limit: int | None = None
    commit: str | None = None


def main(options: Options) -> bool:
    """Whether every run that was asked for had a model."""
    absent = []
    for plan, run in chosen([read_plan(path) for path in options.plans], options.only):
        folder = options.work / plan.name / run.name / "model"
        if folder.is_dir():
            make(plan, run, folder, options)
        else:
            absent.append(f"{plan.name}/{run.name}")
    if absent:
        print(f"without a model in {options.work}: {', '.join(absent)}")
    return not absent


def make(plan: Plan, run: Run, folder: Path, options: Options) -> None:
    """Every task that the entry of a run lacks, saved one by one."""
    path = options.ledger / plan.name / ENTRIES / f"{run.name}.json"
    entry = read_entry(path, FORMAT)
    if entry is not None and entry["limit"] != options.limit:
        raise ValueError(f"`limit` must be that of {path}, {entry['limit']}, got {options.limit}")
    known = {(score["task"], score["shots"]) for score in entry["scores"]} if entry else set()
    wanted = [
        (task, shots)
        for task in options.tasks
        for shots in (options.shots if task == MMLU else (0,))
        if (task, shots) not in known
    ]
    if not wanted:
        return
    model, tokenizer = _open(folder, options.tokenizer)
    entry = entry or {
        "format": FORMAT,
        "version": 1,
        "plan": plan.name,
        "label": run.label,
        "seed": run.seed,
        "commit": options.commit or source_commit() or "unknown",
        "limit": options.limit,
        "batch": options.batch,
        "dtype": str(model.dtype).removeprefix("torch."),
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in LIBRARIES},
        },
        "scores": [],
    }
    for task, shots in wanted:
        with tempfile.TemporaryDirectory() as work:
            scores = run_tasks(
                model, tokenizer, [task], folder=options.items, work=Path(work), shots=shots,
                batch=options.batch, limit=options.limit,
            )  # fmt: skip
        entry["scores"] += [asdict(s) | {"near_chance": bool(s.near_chance)} for s in scores]
        write_atomically(path, json.dumps(entry, indent=1) + "\n")
        shown = ", ".join(f"{s.metric} {s.value.mean:.4g}" for s in scores if s.task == task)
        print(f"{plan.name}/{run.name}: {task}, {shots} shots: {shown}", flush=True)


def _open(folder: Path, tokenizer: Path) -> tuple[Any, Any]:
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), eos_token=END_OF_TEXT)
    return model, fast


if __name__ == "__main__":
    hf.register()
    baselines.register()
    sys.exit(0 if main(tyro.cli(Options)) else 3)
