"""`spattention train`: a recipe, from one CPU to many GPUs."""

from __future__ import annotations

import itertools
import logging
import math
from pathlib import Path

import torch.distributed as dist
from accelerate.utils import get_int_from_env
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..files import check_local, counted, did_you_mean, shown
from ..loading import open_config, open_weights, refuse_run
from ..models import SHAPES
from ..provenance import spattention_command
from ..training.callbacks import Diverged, Event
from ..training.checkpoints import checkpoints
from ..training.pretrain import pretrain
from ..training.recipe import find_recipe, read_recipe
from .options.train import Options


def main(options: Options) -> None:
    """Read the recipe, train, and show progress."""
    if options.minutes is not None and not 0 <= options.minutes < math.inf:
        raise ValueError(f"`--minutes` must be a number from 0 on, got {options.minutes}")
    path = find_recipe(options.recipe)
    recipe = read_recipe(path, list(itertools.chain.from_iterable(options.set)))
    _check_model(recipe.model)
    output = options.output or Path("runs") / path.stem
    if output.exists() and not output.is_dir():
        raise ValueError(f"`--output` must be a folder, {output} is a file")
    first = get_int_from_env(["RANK"], 0) == 0  # torchrun's
    console = Console(quiet=not first)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    try:
        with TrainProgress(console) as progress:
            outcome = pretrain(
                recipe,
                output,
                minutes=options.minutes,
                command=spattention_command(),
                send=progress.update,
            )
    except KeyboardInterrupt:
        saved = checkpoints(output)
        console.print(
            f"Interrupted; the same command resumes from {saved[0]}."
            if saved
            else f"Interrupted before the first checkpoint in {output}.",
            highlight=False,
        )
        raise
    except Diverged as error:
        kept = f"The last checkpoint in {output} is from before"
        if not checkpoints(output):
            kept = f"There is no checkpoint in {output} yet"
        raise ValueError(
            f"stopped: {error}. {kept}; metrics.jsonl has the losses before it. A lower "
            "learning_rate, a longer warmup or another seed may help."
        ) from error
    if outcome.finished:
        console.print(f"Finished: {output}/checkpoint-{outcome.step}", highlight=False)
    else:
        console.print(
            f"Stopped at step {outcome.step} of {outcome.steps}; the same command resumes.",
            highlight=False,
        )
    if dist.is_initialized():  # threads of gloo that are left at the exit of a rank may abort it
        dist.destroy_process_group()


def _check_model(name: str) -> None:
    """Check the folder of a pretrained model, and that a local path is not looked up on the hub."""
    path = Path(name)
    if name in SHAPES:
        return
    if path.is_dir():
        refuse_run("`model`", path)
        open_config(path)
        open_weights(path)
        return
    rule = (
        f"`model` must be one of {list(SHAPES)}, the folder of a saved model or a name on the hub"
    )
    hint = did_you_mean(name, SHAPES)
    if hint or path.exists():
        raise ValueError(f"{rule}, got {shown(name)}{hint}")
    check_local(name, rule)


class TrainProgress:
    """A bar with loss, speed, MFU and time left; without a terminal, a line per log entry."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            speed_estimate_period=300,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None, facts="", visible=False)

    def __enter__(self) -> TrainProgress:
        self._progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._progress.stop()

    def update(self, event: Event) -> None:
        """Show an event of `pretrain`."""
        kind = event["kind"]
        if kind == "note":
            self._console.print(event["text"], highlight=False)
        elif kind == "begin":
            self._console.print(
                f"{event['parameters'] / 1e6:,.1f} M parameters, "
                f"{event['active_parameters'] / 1e6:,.1f} M active; "
                f"attention {event['attention']}; {event['tokens']:,} training tokens, "
                f"{event['epochs']:,.2f} epochs; {counted(event['devices'], 'device')}, "
                f"{counted(event['threads'], 'CPU thread')} each",
                highlight=False,
            )
            self._progress.update(
                self._task, total=event["steps"], completed=event["step"], visible=True
            )
        elif kind == "step":
            self._progress.update(self._task, completed=event["step"])
        elif "eval_loss" in event:
            self._console.print(
                f"step {event['step']}: validation loss {event['eval_loss']:.4f}", highlight=False
            )
        elif "loss" in event:
            facts = f"loss {event['loss']:.4f}, {event.get('tokens_per_second', 0):,.0f} tokens/s"
            if event.get("mfu", 0) >= 0.001:  # on a CPU it is near 0
                facts += f", MFU {100 * event['mfu']:.1f} %"
            self._progress.update(self._task, facts=facts)
            if not self._console.is_terminal:
                self._console.print(f"step {event['step']}: {facts}", highlight=False)
