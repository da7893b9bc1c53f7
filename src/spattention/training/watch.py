"""What watches a long run: speed, metrics, losses that go wrong, checkpoints, the clock."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .callbacks import Event
from .checkpoints import commit, rotate
from .results import write_atomically
from .router import router_losses

METRICS = "metrics.jsonl"


class Diverged(RuntimeError):
    """Training was stopped because of its loss; the message says where and what remains."""


class Speed(TrainerCallback):
    """Adds tokens per second, MFU and the router's losses to what is logged.

    It must come before the callbacks that write. Evaluation and saving do not count as time.

    Args:
        tokens: per step, over all devices.
        work: useful floating-point operations per token.
        peak: floating-point operations per second of all devices together.
    """

    def __init__(self, tokens: int, work: float, peak: float) -> None:
        self.tokens, self.work, self.peak = tokens, work, peak
        self._restart()

    def _restart(self) -> None:
        self._since, self._steps = time.perf_counter(), 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._restart()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._steps += 1

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self._restart()

    def on_save(self, *_: Any, **__: Any) -> None:
        self._restart()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        model: torch.nn.Module | None = None,
        **_: Any,
    ) -> None:
        if logs is None or "loss" not in logs or not self._steps:
            return
        # The Trainer has just read the loss from the device: the steps are over, not only launched.
        speed = self._steps * self.tokens / (time.perf_counter() - self._since)
        logs["tokens"] = state.global_step * self.tokens
        logs["tokens_per_second"] = speed
        logs["mfu"] = speed * self.work / self.peak
        if model is not None:
            logs.update(router_losses(model))
        self._restart()


class Intervals(TrainerCallback):
    """Logs, evaluates and saves as the recipe says now: the Trainer goes on with the intervals of
    the checkpoint.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)


class Metrics(TrainerCallback):
    """Appends what is logged to `metrics.jsonl`, one object a line, and sends it on.

    A run that goes on first drops the lines after its checkpoint, which it will write again.
    """

    def __init__(self, folder: Path, send: Callable[[Event], None]) -> None:
        self.path = folder / METRICS
        self.send = send

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            kept = [e for e in read_metrics(self.path) if e["step"] <= state.global_step]
            write_atomically(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            self.send({"kind": "step", "step": state.global_step})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        entry = {"step": state.global_step, **logs}
        entry.pop("epoch", None)  # the Trainer's: of all items of `InOrder`, not of the data
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self.send({"kind": "log", **entry})


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last one that was cut off is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


class Guard(TrainerCallback):
    """Stops a run whose loss is no number, or stays far above its best.

    The Trainer logs before it saves, and a run logs whenever it saves, so no checkpoint is written
    of a step with such a loss.

    Args:
        above: nats that the mean of the last `losses` logged losses may lie above the lowest such
            mean; 0 lets the loss go where it will, but for NaN and infinity.
    """

    losses = 5

    def __init__(self, above: float) -> None:
        self.above = above

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # The Trainer's own rules were applied before this; they ask for these at their intervals.
        if control.should_save or control.should_evaluate:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        for name in ("loss", "grad_norm", "eval_loss"):
            value = (logs or {}).get(name, 0.0)
            if not math.isfinite(value):
                raise Diverged(f"`{name}` became {value} at step {state.global_step}")
        if not self.above or logs is None or "loss" not in logs:
            return
        history = [entry["loss"] for entry in state.log_history if "loss" in entry]
        means = [mean(history[k : k + self.losses]) for k in range(len(history) - self.losses + 1)]
        if means and means[-1] > min(means) + self.above:
            raise Diverged(
                f"the loss rose to {means[-1]:.3f} at step {state.global_step}, more than "
                f"`divergence` = {self.above} above its best, {min(means):.3f}"
            )


class Keeper(TrainerCallback):
    """Makes checkpoints of what the Trainer wrote aside, and removes old ones.

    Args:
        staging: where the Trainer writes.
        run: where checkpoints lie.
        keep: how many.
    """

    def __init__(self, staging: Path, run: Path, keep: int) -> None:
        self.staging, self.run, self.keep = staging, run, keep

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        _wait_for_all()  # each rank writes a part
        if state.is_world_process_zero:
            commit(self.staging / f"checkpoint-{state.global_step}", self.run)
            rotate(self.run, self.keep)
        _wait_for_all()


class TimeLimit(TrainerCallback):
    """Saves and stops after so many minutes; the same command goes on."""

    def __init__(self, minutes: float) -> None:
        self.until = time.monotonic() + 60 * minutes

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if _any_rank(time.monotonic() > self.until, args.device):
            control.should_save = control.should_log = control.should_training_stop = True


def _wait_for_all() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _any_rank(here: bool, device: torch.device) -> bool:
    """Whether it is so on any rank: clocks differ, and ranks must stop together."""
    if not torch.distributed.is_initialized():
        return here
    found = torch.tensor(float(here), device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return bool(found.item())
