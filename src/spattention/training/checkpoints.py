"""Checkpoints that are whole or not there: written aside, listed with digests, then renamed.

`manifest.json` in a checkpoint gives the size and the SHA-256 of every other file. It tells what
was cut off or damaged; it does not tell who wrote it, so a checkpoint is only as trustworthy as
where it comes from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..files import read_json, reason, sync, sync_tree, write_atomically

MANIFEST = "manifest.json"
MANIFEST_BYTES = 2**26
PREFIX = "checkpoint-"
STAGING = ".saving"
# Pickles of Python objects that nothing here reads; what is read is loaded with `weights_only`.
UNREAD = ("training_args.bin",)


class DamagedCheckpoint(ValueError):
    """A checkpoint is not what its manifest says; the message names the file."""


def commit(staged: Path, run: Path) -> Path:
    """Turn a staged folder into a checkpoint of the run, and return its path."""
    for name in UNREAD:
        (staged / name).unlink(missing_ok=True)
    files = {name: {"bytes": size, "sha256": found} for name, size, found in _digests(staged)}
    write_atomically(staged / MANIFEST, json.dumps({"version": 1, "files": files}, indent=1) + "\n")
    sync_tree(staged)
    final = run / staged.name
    if final.exists():  # of a run that went back behind it
        shutil.rmtree(final)
    staged.rename(final)
    sync(run)
    return final


def check(checkpoint: Path) -> None:
    """Raise `DamagedCheckpoint` unless every file is as it was written."""
    try:
        files = read_json(checkpoint / MANIFEST, MANIFEST_BYTES)["files"]
        wanted = {name: (facts["bytes"], facts["sha256"]) for name, facts in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(
            f"{checkpoint / MANIFEST} cannot be read: {reason(error)}"
        ) from error
    for name, (size, _) in wanted.items():
        path = checkpoint / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{path} is missing")
        if path.stat().st_size != size:
            raise DamagedCheckpoint(f"{path} must have {size} bytes, got {path.stat().st_size}")
    for name, _, found in _digests(checkpoint):
        if name in wanted and found != wanted[name][1]:
            raise DamagedCheckpoint(f"{checkpoint / name} was changed since it was written")


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    found = [p for p in run.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix(PREFIX))


def newest_good(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with those that are newer."""
    problems: list[str] = []
    for checkpoint in checkpoints(run):
        try:
            check(checkpoint)
            return checkpoint, problems
        except DamagedCheckpoint as error:
            problems.append(str(error))
    return None, problems


def rotate(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in checkpoints(run)[keep:]:
        # Renamed first: a folder that is half removed must not look like a checkpoint.
        gone = old.rename(run / f".{old.name}.removed")
        shutil.rmtree(gone)


def clean(run: Path) -> None:
    """Remove what a killed process left half written or half removed."""
    shutil.rmtree(run / STAGING, ignore_errors=True)
    for path in run.glob(f".{PREFIX}*.removed"):
        shutil.rmtree(path, ignore_errors=True)


def _digests(folder: Path) -> list[tuple[str, int, str]]:
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and p != folder / MANIFEST]

    def digest(path: Path) -> tuple[str, int, str]:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        return path.relative_to(folder).as_posix(), path.stat().st_size, found

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(digest, paths))
