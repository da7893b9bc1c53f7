"""Runs side by side on one GPU: steps of small models wait for the host, so that one run alone
leaves the GPU idle for most of its time. Speeds of such runs say nothing, and are not shown.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import rich
from rich.markup import escape

LOOK_EVERY = 0.5  # seconds
TAIL = 12  # lines of the log of a process that failed


def side_by_side(
    commands: Sequence[tuple[str, Sequence[str]]], at_once: int, logs: Path, until: float | None
) -> list[str]:
    """Run commands, `at_once` at a time, in order; returns the names of those that failed.

    Args:
        commands: names, and what to run; a status other than 0 is a failure.
        at_once: how many run at a time.
        logs: folder of what they print, `NAME.log`.
        until: monotonic time from which on none is begun; those that run go on. None: never.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting = list(commands)
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed = []
    try:
        while waiting or running:
            while (
                waiting and len(running) < at_once and (until is None or time.monotonic() < until)
            ):
                name, command = waiting.pop(0)
                with (logs / f"{name}.log").open("ab") as log:
                    running[name] = subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
                    )
                rich.print(f"{escape(name)}: begins, {len(waiting)} wait")
            if not running:
                break
            time.sleep(LOOK_EVERY)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                status = running.pop(name).returncode
                lines = (logs / f"{name}.log").read_text(errors="replace").splitlines()
                if status:
                    failed.append(name)
                    print("\n".join(lines[-TAIL:]))
                rich.print(f"{escape(name)}: {escape(lines[-1]) if lines else 'ends'}", flush=True)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return failed
