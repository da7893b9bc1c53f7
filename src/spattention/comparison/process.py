"""A run in a process of its own, so that its memory is its own and it can be ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess, SpawnContext, SpawnProcess

from ..training.callbacks import Event
from .folder import ResultsFolder
from .plan import Run
from .run import train
from .summary import Result

PRELOADED = ["spattention.comparison.server"]


class RunFailed(RuntimeError):
    """A run ended without a result; the message holds its traceback."""


def train_in_process(run: Run, folder: ResultsFolder, on_event: Callable[[Event], None]) -> Result:
    """`run.train` in a fresh process; `on_event` is called with each event as it arrives.

    Raises:
        RunFailed: if the run raised or its process died.
        KeyboardInterrupt: passed on, once the process has been ended.
    """
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(run, folder, sender), daemon=True)
    try:
        process.start()
        sender.close()
        return _result(run.name, process, receiver, on_event)
    finally:
        if process.pid is not None:
            process.terminate()  # does nothing to one that has ended
            process.join()
        receiver.close()


def _result(
    name: str,
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
                f"the process of {name} ended with status {process.exitcode} and no result"
            ) from None
        if kind == "result":
            process.join()
            return content
        if kind == "error":
            raise RunFailed(f"{name} failed:\n{content}")
        on_event(content)


def _context() -> ForkServerContext | SpawnContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The libraries are imported once, by a server that then forks a clean process for each run.
    context.set_forkserver_preload(PRELOADED)
    return context


def show_one_gpu() -> None:
    """Leave this process the first of the GPUs that it sees: a run is one process, and the Trainer
    would split its batch over all of them. CUDA takes no other word for it before it starts.
    """
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[0]


def _work(run: Run, folder: ResultsFolder, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for a spawned process; see `server`
    show_one_gpu()
    try:
        sender.send(("result", train(run, folder, lambda event: sender.send(("event", event)))))
    except BrokenPipeError:
        pass  # the parent has gone, nobody waits for the rest
    except Exception:  # whatever it was, the parent reports it
        sender.send(("error", traceback.format_exc()))
    finally:
        sender.close()
