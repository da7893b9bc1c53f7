"""Processes that compile and check their cases at the same time, then measure one by one."""

from __future__ import annotations

import json
import os
import select
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from .cases import Case

MEASURE_SECONDS = 45  # of one case


class Worker:
    """A process that prepares cases, then measures each when it is told to."""

    def __init__(self, cases: list[Case]) -> None:
        self.cases = cases
        self.failed: dict[Case, str] = {}
        self.seconds: dict[Case, float] = {}
        # Every worker compiles in its own process: many at a time would compete for the cores.
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.limits.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self.send([asdict(case) for case in cases])

    def send(self, message: Any) -> None:
        """Write a line to the process; a process that has ended is found by `receive`."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.process.wait()

    def receive(self, seconds: float | None = None) -> dict[str, Any] | None:
        """The next message, or None if the process has ended, or sends none within `seconds`."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return None
        for line in self.process.stdout:
            if line.startswith("{"):  # packages print to the same stream
                message: dict[str, Any] = json.loads(line)
                return message
        return None

    def prepared(self) -> None:
        """Read what became of the preparation: reasons and seconds by case."""
        message = self.receive()
        if message is None:
            self.failed = dict.fromkeys(self.cases, "its worker ended")
            return
        self.failed = {self.cases[int(i)]: why for i, why in message["failed"].items()}
        self.seconds = {self.cases[int(i)]: spent for i, spent in message["seconds"].items()}

    def fail(self, reason: str) -> None:
        """Give up all cases, and end the process."""
        self.failed = dict.fromkeys(self.cases, reason)
        self.stop()

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def prepare(
    groups: list[list[Case]],
    seconds: float,
    processes: int,
    start: Callable[[list[Case]], Worker] = Worker,
) -> list[Worker]:
    """Workers of all groups in order, each ready or failed.

    Args:
        groups: cases of each worker, the most important first.
        seconds: after which workers that are not ready are given up.
        processes: workers that prepare at the same time.
        start: starts a worker.
    """
    began = time.monotonic()
    workers: list[Worker] = []
    selector = selectors.DefaultSelector()
    for cases in groups:
        while len(selector.get_map()) >= processes:
            _await_one(selector, began, seconds)
        workers.append(start(cases))
        if time.monotonic() - began > seconds:
            workers[-1].fail(f"was not compiled after {seconds:.0f} s, as others were first")
            continue
        assert workers[-1].process.stdout is not None
        selector.register(workers[-1].process.stdout, selectors.EVENT_READ, workers[-1])
    while selector.get_map():
        _await_one(selector, began, seconds)
    return workers


def _await_one(selector: selectors.BaseSelector, began: float, seconds: float) -> None:
    """Wait until a worker is ready, or give up all that are not when the time is over."""
    left = seconds - (time.monotonic() - began)
    ready = [key for key, _ in selector.select(max(left, 0.0))]
    for key in ready or list(selector.get_map().values()):
        worker: Worker = key.data
        selector.unregister(key.fileobj)
        passed = time.monotonic() - began
        if ready:
            worker.prepared()
        else:
            worker.fail(f"was not compiled after {seconds:.0f} s")
        print(f"[{passed:5.0f} s] {worker.cases[0]} and {len(worker.cases) - 1} more", flush=True)
        for case, why in worker.failed.items():
            print(f"  not measured: {case}: {why}", flush=True)


def measure(worker: Worker, case: Case) -> dict[str, Any]:
    """The numbers of a case, or `{"failed": reason}`."""
    if case in worker.failed:
        return {"failed": worker.failed[case]}
    worker.send(worker.cases.index(case))
    found = worker.receive(MEASURE_SECONDS)
    if found is None:
        worker.fail(f"its worker ended or took {MEASURE_SECONDS} s")
        return {"failed": worker.failed[case]}
    return {**found, "prepared": worker.seconds.get(case)}
