"""The progress of a comparison: run, step, loss, speed and time left."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..comparison.plan import Run
from ..comparison.summary import Result
from ..training.callbacks import Event


class RunProgress:
    """A bar for the current run and one for all runs; a finished run leaves a line."""

    def __init__(self, runs: Sequence[Run], console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),  # leaves room for the rest in 80 columns
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[facts]}"),
            # A speed averaged over two minutes stays steady through evaluations and changes of run.
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            speed_estimate_period=120,
        )
        steps = sum(run.recipe.steps for run in runs)
        self._all = self._progress.add_task("all runs", total=steps, facts="", visible=bool(runs))
        self._run = self._progress.add_task("", total=None, facts="", visible=False)
        self._seeds = len({run.seed for run in runs})
        self._before = 0
        self._facts = ""

    def __enter__(self) -> RunProgress:
        self._progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._progress.stop()

    def begin(self, run: Run) -> None:
        """Show that a run starts."""
        self._facts = "loading"
        self._progress.reset(
            self._run,
            total=run.recipe.steps,
            description=run.label + (f", seed {run.seed}" if self._seeds > 1 else ""),
            facts="loading",
            visible=True,
        )

    def update(self, event: Event) -> None:
        """Show an event of `pretrain`."""
        kind = event["kind"]
        if kind == "note":
            self._console.print(event["text"], highlight=False)
            return
        if "loss" in event:
            speed = event.get("tokens_per_second", 0)
            self._facts = f"loss {event['loss']:.3f}, {speed:,.0f} tokens/s,"
        step = event["step"]
        self._progress.update(self._run, completed=step, facts=self._facts)
        self._progress.update(self._all, completed=self._before + step)

    def finish(self, result: Result) -> None:
        """Show that a run is finished."""
        self._before += int(self._progress.tasks[self._run].total or 0)
        self._progress.update(self._run, visible=False)
        self._console.print(
            f"{result.attention}, seed {result.seed}: validation loss "
            f"{result.validation_loss:.3f}, "
            f"{result.tokens_per_second:,.0f} tokens/s, {result.seconds:.0f} s",
            highlight=False,
        )
