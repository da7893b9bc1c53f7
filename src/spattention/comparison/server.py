"""Imported once, by the server that forks a process for each run; by nothing else.

It loads what a run needs, and makes the runs deaf to Ctrl-C from their first moment: the terminal
sends it to every process, and the parent alone decides what becomes of a run.
"""

from __future__ import annotations

import signal

from . import run

__all__ = ["run"]

signal.signal(signal.SIGINT, signal.SIG_IGN)
