"""A handler of Ctrl-C that loses no interrupt."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupts:
    """Raise KeyboardInterrupt as Python does, and remember it.

    Python swallows an exception that is raised in a finalizer, and the work would continue for
    hours. `check`, called now and then, raises it again. Outside the main thread, which alone
    receives signals, and where another handler of Ctrl-C is installed, this does nothing.
    """

    def __init__(self) -> None:
        self._seen = False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *raised: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def check(self) -> None:
        """Raise KeyboardInterrupt if one came."""
        if self._seen:
            raise KeyboardInterrupt

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._seen = True
        raise KeyboardInterrupt
