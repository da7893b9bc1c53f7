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

from ..files import (
    is_unfinished,
    read_json,
    reason,
    remove_unfinished,
    shown,
    sync,
    write_atomically,
)
from ..training.lock import LOCK
from .plan import Run
from .summary import Result

RESULT_BYTES = 2**26
VERSION = 2  # of comparison.json; settings of version 1 were no fields of a recipe


class ResultsFolder:
    """Finished runs of one comparison, one JSON each, the models that they trained, and the folders
    of runs that are not finished.

    Args:
        path: the folder; it must be new, empty or a comparison's already. Nothing is written before
            `claim`, except for what is prepared in `staging`.

    Raises:
        ValueError: if it holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs = path / "runs"
        self.models = path / "models"
        self.training = path / "training"
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

    def claim(self, settings: dict[str, Any], *, restart: bool = False) -> None:
        """Hold runs with these settings from now on, on the data in `staging` if there is any. With
        `restart`, forget the runs, the models and the settings that are there.

        Raises:
            ValueError: if there are runs with other settings, which could not be compared; nothing
                was changed then.
        """
        if not restart:
            self._check(settings)
        old = [self.runs, self.models, self.training] if restart else []
        if not restart and self._differences(settings):
            old = [self.training]  # a run of other settings, which is not finished
        for folder in old:
            if folder.exists():
                shutil.rmtree(folder)
        content = {"version": VERSION, "settings": settings}
        write_atomically(self._mark, json.dumps(content, indent=2) + "\n")
        if self.staging.exists():
            if self.data.exists():
                shutil.rmtree(self.data)
            self.staging.rename(self.data)
            sync(self.path)
        for folder in (self.path, self.runs):
            remove_unfinished(folder)

    def _check(self, settings: dict[str, Any]) -> None:
        different = self._differences(settings) if self.runs.exists() else []
        if different:
            raise ValueError(
                f"`--output` {self.path} holds runs with other settings ({'; '.join(different)}): "
                "name another folder, or give --restart to replace them"
            )

    def _differences(self, settings: dict[str, Any]) -> list[str]:
        """Settings that are not those of the comparison that is there."""
        if not self._mark.exists():
            return []
        content = read_json(self._mark)
        found = content.get("settings")
        if not isinstance(found, dict):
            raise ValueError(f"{self._mark} must hold `settings`, an object, got {shown(found)}")
        if content.get("version") != VERSION:
            return [f"version was {shown(content.get('version'))}, now {VERSION}"]
        return [
            f"{name} was {shown(found.get(name))}, now {value}"
            for name, value in settings.items()
            if found.get(name) != value
        ]

    def find(self, run: Run) -> Result | None:
        """The result of this run, if it is finished."""
        file = self.runs / f"{run.name}.json"
        if not file.exists():
            return None
        try:
            return result_from(read_json(file, RESULT_BYTES))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{file} must hold a finished run, and does not ({reason(error)}): remove it to "
                "train this run again"
            ) from error

    def add(self, run: Run, result: Result) -> None:
        """Keep the result of a finished run, and remove the state of its training."""
        write_atomically(
            self.runs / f"{run.name}.json", json.dumps(asdict(result), indent=2) + "\n"
        )
        shutil.rmtree(self.training / run.name, ignore_errors=True)

    def finished(self, runs: Sequence[Run]) -> list[Result]:
        """Results of those runs that are finished, in the order of the runs."""
        return [found for run in runs if (found := self.find(run)) is not None]


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
