"""The folder of a comparison: what is finished stays, whatever happens next."""

from __future__ import annotations

import json
import shutil
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import is_unfinished, read_json, remove_unfinished, shown, sync, write_atomically
from .lock import LOCK, held
from .settings import Settings
from .variant import Job, Result

RESULT_BYTES = 2**26
__all__ = ["ResultsFolder", "held", "result_from", "write_atomically"]


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
        ours = (self.staging, self._lock)
        if any(entry not in ours and not is_unfinished(entry) for entry in others):
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
            sync(self.path)
        for folder in (self.path, self.runs):
            remove_unfinished(folder)

    def _check(self, settings: Settings) -> None:
        if not self._mark.exists() or not self.runs.exists():
            return
        wanted = asdict(settings)
        found = read_json(self._mark).get("settings")
        if not isinstance(found, dict):
            raise ValueError(f"{self._mark} must hold `settings`, an object, got {shown(found)}")
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
        if not file.exists():
            return None
        try:
            return result_from(read_json(file, RESULT_BYTES))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{file} must hold a finished run, and does not ({error!r}): remove it to train "
                "this run again"
            ) from error

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
    for name, hint in typing.get_type_hints(Result).items():
        plain: dict[Any, tuple[type, ...]] = {str: (str,), int: (int,), float: (int, float)}
        if hint in plain and not isinstance(values[name], plain[hint]):
            raise TypeError(f"{name} is {shown(values[name])}")
    for name in ("train_losses", "validation_losses"):
        values[name] = [tuple(point) for point in values[name]]  # JSON has no tuples
    return Result(**values)
