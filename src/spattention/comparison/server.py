"""Imported once, by the server that forks a process for each run; by nothing else.

It loads what a run needs. Processes of runs ignore Ctrl-C, which the terminal sends to every
process: the parent alone ends a run.
"""

from __future__ import annotations

import signal

from . import run

__all__ = ["run"]

signal.signal(signal.SIGINT, signal.SIG_IGN)
