"""Turns of processes on one GPU: all prepare at the same time, and one times alone."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def turns(path: Path | None) -> Iterator[Callable[[], None]]:
    """A function that waits until no other process of this file prepares or times, and keeps them
    all waiting to the end of the context. Without a file it does nothing.
    """
    if path is None:
        yield lambda: None
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield lambda: fcntl.flock(file, fcntl.LOCK_EX)
