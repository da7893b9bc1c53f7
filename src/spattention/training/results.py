"""The folder of a comparison: what is finished stays, whatever happens next."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .settings import Settings
from .variant import Job, Result

LOCK = ".lock"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that is either the old one or the whole new one, never a part."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(temporary).chmod(0o644)  # mkstemp's own mode would hide it from other users
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder for this process alone; made if need be, and removed at the end if it stays empty.

    Raises:
        ValueError: if another process has it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK
    lock = FileLock(file)  # the system lets go of it, however the process ends
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"`--output` must be used by one process at a time, another one is at work in {folder}"
        ) from error
    except NotImplementedError:
        warnings.warn(
            f"{folder} is on a file system without locks: nothing keeps another process out of it",
            stacklevel=3,
        )
    try:
        yield
    finally:
        with suppress(OSError):  # where an open file cannot be removed, it may stay
            file.unlink()
        lock.release()
        for path in made:
            if any(path.iterdir()):
                break
            path.rmdir()


class ResultsFolder:
    """Finished runs of one comparison, one JSON each, and the models that they trained.

    Args:
        path: the folder; it must be new, empty or a comparison's already. Nothing is written before
            `claim`, but for what is prepared in `staging`.

    Raises:
        ValueError: if it holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs = path / "runs"
        self.models = path / "models"
        self.data = path / "data"
        self.staging = path / ".preparing"
        self._mark = path / "comparison.json"
        self._lock = path / LOCK
        if path.exists() and not path.is_dir():
            raise ValueError(f"`--output` must be a folder, {path} is a file")
        others = path.iterdir() if path.exists() and not self._mark.exists() else ()
        if any(entry not in (self.staging, self._lock) for entry in others):
            raise ValueError(
                "`--output` must be a new or empty folder, or hold an earlier comparison; "
                f"{path} holds other files"
            )

    @contextmanager
    def preparing(self) -> Iterator[Path]:
        """A fresh folder for data that `claim` moves into place; what is not moved is removed."""
        shutil.rmtree(self.staging, ignore_errors=True)  # of a process that was killed
        self.staging.mkdir(parents=True)
        try:
            yield self.staging
        finally:
            shutil.rmtree(self.staging, ignore_errors=True)

    def claim(self, settings: Settings, *, restart: bool = False) -> None:
        """Hold runs with these settings from now on, on the data in `staging` if there is any.

        Args:
            settings: what the runs share.
            restart: forget the runs, the models and the settings that are there.

        Raises:
            ValueError: if there are runs with other settings, which could not be compared; nothing
                was changed then.
        """
        if not restart:
            self._check(settings)
        for folder in (self.runs, self.models) if restart else ():
            if folder.exists():
                shutil.rmtree(folder)
        content = {"version": 1, "settings": asdict(settings)}
        write_atomically(self._mark, json.dumps(content, indent=2) + "\n")
        if self.staging.exists():
            if self.data.exists():
                shutil.rmtree(self.data)
            self.staging.rename(self.data)

    def _check(self, settings: Settings) -> None:
        if not self._mark.exists() or not self.runs.exists():
            return
        wanted = asdict(settings)
        found = json.loads(self._mark.read_text(encoding="utf-8"))["settings"] or {}
        different = [
            f"{name} was {found.get(name)}, now {wanted[name]}"
            for name in wanted
            if found.get(name) != wanted[name]
        ]
        if different:
            raise ValueError(
                f"`--output` {self.path} holds runs with other settings ({'; '.join(different)}): "
                "name another folder, or give --restart to replace them"
            )

    def find(self, job: Job) -> Result | None:
        """The result of this job, if it is finished."""
        file = self.runs / f"{job.name}.json"
        return result_from(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None

    def add(self, job: Job, result: Result) -> None:
        """Keep a finished run."""
        write_atomically(
            self.runs / f"{job.name}.json", json.dumps(asdict(result), indent=2) + "\n"
        )

    def finished(self, jobs: Sequence[Job]) -> list[Result]:
        """Results of those jobs that are finished, in the order of the jobs."""
        return [found for job in jobs if (found := self.find(job)) is not None]


def result_from(data: dict[str, Any]) -> Result:
    """The result that `add` wrote."""
    values = dict(data)
    for name in ("train_losses", "validation_losses"):
        values[name] = [tuple(point) for point in values[name]]  # JSON has no tuples
    return Result(**values)
