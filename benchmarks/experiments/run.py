"""Make the runs of plans, in pieces: what is finished is in the ledger, what is not goes on.

    python -m benchmarks.experiments.run benchmarks/experiments/plans/paper.toml \
        --data streams --minutes 8

Checkpoints lie in the work folder; the same command goes on from them. The work folder may be
thrown away between runs, never between the pieces of one. `--at-once 4` makes four runs at a time
on the same GPU, each in a process of its own.

An entry is written after every validation loss, so that a run that is killed leaves its losses. A
model is evaluated by the process that trained it. With `--tokenizer` that includes passkeys and
RULER's tasks at the model's whole context.
"""

from __future__ import annotations

import gc
import json
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers import AutoModelForCausalLM

from spattention import baselines, hf
from spattention.comparison.plan import Plan, Run
from spattention.data.training import open_training
from spattention.evaluation.heads import head_statistics
from spattention.evaluation.perplexity import LossByPosition, validation_loss
from spattention.evaluation.recall import questions, recall
from spattention.provenance import source_commit
from spattention.training.callbacks import Diverged
from spattention.training.checkpoints import newest_good
from spattention.training.pretrain import pretrain
from spattention.training.recipe import Recipe, recipe_from
from spattention.training.record import LOSSES

from .costs import cache_after
from .ledger import HERE, PLACES, check_same, entry_path, finished, read_entry, write_entry
from .plan_files import chosen, read_plan
from .retrieval import retrieval
from .side_by_side import side_by_side

OF_THE_RUN = ("facts", "machine", "versions", "train", "validation")  # from its losses.json
HEAD_ROWS, HEAD_TOKENS = 4, 32_768  # windows that heads are looked at on
SMALLEST_PIECE = 60.0  # seconds: less is not worth starting and compiling a run for
Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """Make the runs of plans, in the order given, until all are finished or the time is over.

    Args:
        plans: TOML files, see plan.py.
        data: Folder of the token files that plans name.
        work: Folder of checkpoints.
        ledger: Folder of the entries.
        minutes: Stop after so long, with a checkpoint of the run in progress; None: never.
        only: Labels or names (`LABEL-seedN`) of the runs to make, of those in the plans; all
            without it.
        set: Changes to the recipes, as in steps=100.
        commit: The commit to record, where git cannot tell.
        windows: Validation windows of the final loss by position.
        items: Sequences per question of recall; 0 takes neither recall nor a look at heads.
        tokenizer: `tokenizer.json` of the data, for passkeys and RULER's tasks; neither without it.
        prompts: Prompts per task, and passkeys per depth.
        at_once: Runs that are made at a time. Entries of several at once hold no speeds worth
            showing, and none is shown.
        beside: How many other runs share the GPU, or other work the host; `--at-once` gives it to
            its processes.
        until: As `minutes`, in the system's monotonic seconds; given likewise.
    """

    plans: tyro.conf.Positional[tuple[Path, ...]]
    data: Path = Path("data")
    work: Path = Path("runs/experiments")
    ledger: Path = HERE
    minutes: float | None = None
    only: tuple[str, ...] = ()
    set: tuple[str, ...] = ()
    commit: str | None = None
    windows: int = 256
    items: int = 16
    tokenizer: Path | None = None
    prompts: int = 16
    at_once: int = 1
    beside: int = 0
    until: float | None = None


def main(options: Options) -> bool:
    """Whether everything is finished. A run that fails does not keep the others from being made."""
    until = options.until
    if until is None and options.minutes is not None:
        until = time.monotonic() + 60 * options.minutes
    commit = options.commit or source_commit() or "unknown"
    plans = [read_plan(path, options.set) for path in options.plans]
    jobs = chosen(plans, options.only)
    if options.at_once < 1:
        raise ValueError(f"`--at-once` must be at least 1, got {options.at_once}")
    for plan, run in jobs:
        path = entry_path(options.ledger, plan.name, run.name)
        known = read_entry(path)
        if known is not None:
            check_same(path, known, _placed(run, options).to_dict())
    if options.at_once > 1:
        return _several(jobs, options, commit, until)
    failed = []
    for plan, run in jobs:
        left = None if until is None else until - time.monotonic()
        try:
            done = make(plan, run, options, commit, left)
        except Exception:
            traceback.print_exc()
            failed.append(f"{plan.name}/{run.name}")
            done = True
        gc.collect()
        torch.cuda.empty_cache()
        if not done:
            print(f"out of time at {plan.name}/{run.name}; the same command goes on")
            return False
    print(f"failed: {', '.join(failed)}" if failed else "all runs are finished")
    return not failed


def _several(
    jobs: list[tuple[Plan, Run]], options: Options, commit: str, until: float | None
) -> bool:
    """Make runs in processes of their own; whether everything is finished."""
    sources = {path.stem: path for path in options.plans}
    commands = []
    for plan, run in jobs:
        entry = read_entry(entry_path(options.ledger, plan.name, run.name))
        if not _done(entry):
            arguments = _of_one(options, sources[plan.name], run, commit, until)
            commands.append((f"{plan.name}-{run.name}", arguments))
    last = None if until is None else until - SMALLEST_PIECE
    failed = side_by_side(commands, options.at_once, options.work / "logs", last)
    left = [
        f"{plan.name}/{run.name}"
        for plan, run in jobs
        if not _done(read_entry(entry_path(options.ledger, plan.name, run.name)))
    ]
    print(f"failed or not finished: {', '.join(left)}" if left else "all runs are finished")
    return not failed and not left


def _done(entry: dict[str, Any] | None) -> bool:
    return finished(entry) or (entry is not None and entry["diverged"] is not None)


def _of_one(options: Options, plan: Path, run: Run, commit: str, until: float | None) -> list[str]:
    """What a process is called with that makes one run of several at once."""
    values = {
        "data": options.data,
        "work": options.work,
        "ledger": options.ledger,
        "only": run.name,
        "commit": commit,
        "windows": options.windows,
        "items": options.items,
        "prompts": options.prompts,
        **({} if options.tokenizer is None else {"tokenizer": options.tokenizer}),
        "beside": options.at_once - 1,
        **({} if until is None else {"until": until}),
    }
    named = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    changes = ["--set", *options.set] if options.set else []
    return [sys.executable, "-m", "benchmarks.experiments.run", str(plan), *named, *changes]


def make(plan: Plan, run: Run, options: Options, commit: str, seconds: float | None) -> bool:
    """Make one run, or a piece of it; whether it is finished."""
    path = entry_path(options.ledger, plan.name, run.name)
    recipe = _placed(run, options)
    known = read_entry(path)
    if _done(known):
        return True
    if seconds is not None and seconds < SMALLEST_PIECE:
        return False
    began = time.monotonic()
    _say(f"{plan.name}/{run.name}")(f"begins; {_left(seconds)}")
    folder = options.work / plan.name / run.name
    torch._dynamo.reset()  # graphs of the run before it; their number is limited
    minutes = None
    if seconds is not None:
        minutes = max(0.0, seconds - (time.monotonic() - began)) / 60

    def save(step: int, diverged: str | None = None, final: dict[str, Any] | None = None) -> None:
        losses = json.loads((folder / LOSSES).read_text()) if diverged is None else {}
        entry = {
            "plan": plan.name,
            "title": plan.title,
            "label": run.label,
            "seed": run.seed,
            "step": step,
            "tokens": step * recipe.batch * recipe.context,
            "diverged": diverged,
            "commit": commit,
            "command": _command(plan, run, options),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "data": json.loads((folder / "run.json").read_text())["data"],
            "beside": max(options.beside, (known or {}).get("beside", 0)),
            "seconds": (known or {}).get("seconds", 0.0) + time.monotonic() - began,
            "recipe": {**recipe.to_dict(), **{name: run.fields[name] for name in PLACES}},
            "facts": {},
            "train": [],
            "validation": [],
            **{name: losses[name] for name in OF_THE_RUN if name in losses},
            "final": final,
        }
        write_entry(path, entry)

    diverged = None
    try:
        outcome = pretrain(recipe, folder, minutes=minutes, send=_Report(recipe.steps, save).update)
        step = outcome.step
    except Diverged as error:
        diverged, step = str(error), 0
    done = step == recipe.steps
    final = _final(recipe, folder, options) if done else None
    save(step, diverged, final)
    if final is not None:
        _say(f"{plan.name}/{run.name}")(f"loss {final['loss']['mean']:.4f}")
        _keep_model(folder)
    return done or diverged is not None


def _command(plan: Plan, run: Run, options: Options) -> str:
    """What makes this run anywhere, with folders of one's own."""
    changes = " ".join(shlex.quote(change) for change in options.set)
    return (
        f"python -m benchmarks.experiments.run benchmarks/experiments/plans/{plan.name}.toml "
        f"--only {run.name} --windows {options.windows} --items {options.items} "
        f"--prompts {options.prompts}" + (f" --set {changes}" if changes else "")
    )


def _placed(run: Run, options: Options) -> Recipe:
    """The recipe, its data where they are on this machine."""
    fields = dict(run.fields)
    for name in ("data", "validation"):
        fields[name] = [str(options.data / path) for path in fields[name]]
    return recipe_from(fields)


def _final(recipe: Recipe, folder: Path, options: Options) -> dict[str, Any]:
    """The validation loss of the last checkpoint, by position; its recall, and its heads."""
    checkpoint, problems = newest_good(folder)
    if checkpoint is None:
        raise RuntimeError(f"{folder} must hold a checkpoint, {problems}")
    data = open_training(
        recipe.validation,  # the training data are not needed any more
        recipe.validation,
        context=recipe.context,
        end_of_text=recipe.end_of_text,
        limit=options.windows,
    )
    assert data.validation is not None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(device)
    at_once = max(1, min(recipe.micro_batch, 32_768 // recipe.context))
    found: LossByPosition = validation_loss(model, data.validation, batch=at_once)
    return {
        "loss": vars(found.loss),
        "edges": list(found.edges),
        "by_position": [round(part.mean, 5) for part in found.parts],
        "by_position_error": [round(part.error, 5) for part in found.parts],
        "cache_bytes": cache_after(model, data.validation[0]["input_ids"][None]),
        **(_looks(model, data.validation, options.items) if options.items else {}),
        **_retrieval(model, data.validation, options),
    }


def _retrieval(model: Any, windows: Any, options: Options) -> dict[str, Any]:
    if options.tokenizer is None:
        return {}
    return {"retrieval": retrieval(model, windows, options.tokenizer, options.prompts)}


def _looks(model: Any, windows: Any, items: int) -> dict[str, Any]:
    """Recall of random tokens, and what heads look at, with real text around."""
    text = torch.stack([windows[k % len(windows)]["input_ids"] for k in range(items)])
    config = model.config.get_text_config()
    scores = recall(model, list(questions(config.vocab_size, text.shape[1], text, items)))
    rows = max(1, min(HEAD_ROWS, HEAD_TOKENS // text.shape[1]))
    return {
        "recall": [asdict(score) | {"near_chance": bool(score.near_chance)} for score in scores],
        "heads": [asdict(layer) for layer in head_statistics(model, text[:rows])],
    }


def _keep_model(folder: Path) -> None:
    """A finished run does not go on: its model stays, the large states of its optimizer do not."""
    newest, _ = newest_good(folder)
    assert newest is not None
    model = folder / "model"
    model.mkdir(exist_ok=True)
    for path in newest.iterdir():
        if path.suffix == ".safetensors" or path.name.endswith("config.json"):
            path.replace(model / path.name)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


@dataclass
class _Report:
    """Shows what a run sends, and saves its entry once a validation loss has been recorded.

    Attributes:
        steps: of the whole run, whose last step is saved with its evaluation.
        save: called with the step of that loss.
    """

    steps: int
    save: Callable[[int], None]
    unsaved: int | None = None

    def update(self, event: dict[str, Any]) -> None:
        if event["kind"] == "note":
            print(f"  {event['text']}", flush=True)
        elif event["kind"] == "step" and self.unsaved is not None:
            self.save(self.unsaved)  # the step after it: the file of losses has it now
            self.unsaved = None
        elif "eval_loss" in event:
            print(f"  step {event['step']}: validation {event['eval_loss']:.4f}", flush=True)
            self.unsaved = event["step"] if event["step"] < self.steps else None
        elif "loss" in event:
            speed = event.get("tokens_per_second", 0)
            print(
                f"  step {event['step']}: loss {event['loss']:.4f}, {speed:,.0f} tokens/s",
                flush=True,
            )


def _say(name: str) -> Say:
    return lambda text: print(f"{name}: {text}", flush=True)


def _left(seconds: float | None) -> str:
    return "no limit of time" if seconds is None else f"{seconds / 60:.1f} minutes left"


if __name__ == "__main__":
    hf.register()
    baselines.register()
    sys.exit(0 if main(tyro.cli(Options)) else 3)
