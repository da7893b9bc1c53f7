"""A run in a process of its own, so that its memory is its own and it can be ended."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess, SpawnContext, SpawnProcess

from .callbacks import Event
from .variant import Job, Result, run

PRELOADED = ["spattention.training.server"]


class RunFailed(RuntimeError):
    """A run ended without a result; the message holds its traceback."""


def run_apart(job: Job, on_event: Callable[[Event], None]) -> Result:
    """`variant.run` in a fresh process.

    Args:
        job: what to run.
        on_event: called with each event as it arrives.

    Raises:
        RunFailed: if the run raised or its process died.
        KeyboardInterrupt: passed on, once the process has been ended.
    """
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, sender), daemon=True)
    try:
        process.start()
        sender.close()
        return _result(job, process, receiver, on_event)
    finally:
        if process.pid is not None:
            process.terminate()  # does nothing to one that has ended
            process.join()
        receiver.close()


def _result(
    job: Job,
    process: ForkServerProcess | SpawnProcess,
    receiver: Connection,
    on_event: Callable[[Event], None],
) -> Result:
    while True:
        try:
            kind, content = receiver.recv()
        except EOFError:
            process.join()
            raise RunFailed(
                f"the process of {job.name} ended with status {process.exitcode} and no result"
            ) from None
        if kind == "result":
            process.join()
            return content
        if kind == "error":
            raise RunFailed(f"{job.name} failed:\n{content}")
        on_event(content)


def _context() -> ForkServerContext | SpawnContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The libraries are imported once, by a server that then forks a clean process for each run.
    context.set_forkserver_preload(PRELOADED)
    return context


def _work(job: Job, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for a spawned process; see `server`
    try:
        sender.send(("result", run(job, lambda event: sender.send(("event", event)))))
    except BrokenPipeError:
        pass  # the parent has gone, nobody waits for the rest
    except Exception:  # whatever it was, the parent reports it
        sender.send(("error", traceback.format_exc()))
    finally:
        sender.close()
