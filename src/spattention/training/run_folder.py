"""The folder of a run: what it must hold for the run to continue, and where it continues."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from ..data.training import TrainingData
from ..files import is_unfinished, read_json, remove_unfinished, shown, write_atomically
from .checkpoints import STAGING, checkpoints, clean, newest_good, step_of
from .lock import LOCK
from .metrics import METRICS, read_metrics
from .recipe import Recipe
from .record import read_record

MARK = "run.json"
VERSION = 1


def check_folder(recipe: Recipe, folder: Path, data: TrainingData) -> None:
    """Raise ValueError unless a run of this recipe on these data can begin or continue there.

    Nothing is written. Every file of the run that is read later is checked here, except for
    checkpoints: see `claim`.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`--output` must be a folder, {folder} is a file")
    mark = folder / MARK
    if not mark.exists():
        others = folder.iterdir() if folder.exists() else ()
        if any(p.name not in (STAGING, LOCK) and not is_unfinished(p) for p in others):
            raise ValueError(
                f"`--output` must be a new or empty folder, or an earlier run's; {folder} holds "
                "other files"
            )
        return
    found = read_json(mark)
    kinds = {"version": int, "recipe": dict, "data": str, "contents": str}
    # Runs that began before `contents` was written have the digest alone.
    found = {"contents": data.contents, **found}
    for name, kind in kinds.items():
        if not isinstance(found.get(name), kind):
            raise ValueError(
                f"{mark} must hold `{name}`, a JSON {'object' if kind is dict else kind.__name__}, "
                f"as `spattention train` wrote it; got {shown(found.get(name))}"
            )
    if found["version"] != VERSION:
        raise ValueError(f"{mark} must have the version {VERSION}, got {found['version']}")
    different = recipe.differences(found["recipe"])
    if found["data"] != data.digest or found["contents"] != data.contents:
        different.append("the data is another")
    if different:
        more = ""
        if recipe.steps > found["recipe"].get("steps", recipe.steps) and (
            last := checkpoints(folder)
        ):
            more = (
                ". The learning rate of a run ends with its steps, so that a run cannot be made "
                f"longer; `--set model={last[0]}` starts a new run from its weights"
            )
        raise ValueError(
            f"`--output` {folder} holds a run of another recipe ({'; '.join(different)}): name "
            f"another folder{more}"
        )
    read_metrics(folder / METRICS)
    read_record(folder)


def claim(recipe: Recipe, folder: Path, data: TrainingData) -> tuple[Path | None, list[str]]:
    """Write `run.json` and find the checkpoint to continue from; damaged ones are put aside.

    Returns:
        The checkpoint, None for a run that begins, and what a reader should know.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    remove_unfinished(folder)
    content = {
        "version": VERSION,
        "recipe": recipe.to_dict(),
        "data": data.digest,
        "contents": data.contents,
    }
    write_atomically(folder / MARK, json.dumps(content, indent=2) + "\n")
    resume, problems = newest_good(folder)
    notes = [f"damaged checkpoint: {problem}" for problem in problems]
    for path in checkpoints(folder) if problems else ():
        if resume is None or step_of(path) > step_of(resume):
            path.rename(_unused(path.with_name(f"damaged-{path.name}")))
    if resume is not None:
        done = step_of(resume) == recipe.steps
        notes.append(
            f"all {recipe.steps} steps are done: {resume}" if done else f"resuming from {resume}"
        )
    elif problems:
        notes.append("no checkpoint is whole: starting again")
    return resume, notes


def _unused(path: Path) -> Path:
    """The path, or the same with the first number behind it that is not taken."""
    taken = itertools.count(2)
    found = path
    while found.exists():
        found = path.with_name(f"{path.name}-{next(taken)}")
    return found
