"""A folder that belongs to one process at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..files import make_folder, remove_empty

LOCK = ".lock"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock a folder for this process; it is made if need be, and removed if it stays empty.

    Raises:
        ValueError: if another process has it.
    """
    made = make_folder(folder)
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
        remove_empty(made)
