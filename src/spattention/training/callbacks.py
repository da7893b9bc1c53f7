"""Callbacks of the Trainer: speed, metrics, divergence, checkpoints, time, losses."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import (
    IntervalStrategy,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..choice import AttentionChoice
from .checkpoints import commit, rotate
from .metrics import METRICS, append_metrics, read_metrics, sync_metrics, write_metrics
from .router import router_losses

Event = dict[str, Any]


class Diverged(RuntimeError):
    """Training was stopped because of its loss; the message names value and step."""


class ThroughputCallback(TrainerCallback):
    """Adds tokens per second, MFU and the router's losses to what is logged.

    It must come before the callbacks that write. Evaluation and saving do not count as time.

    Args:
        tokens: tokens per step, over all devices.
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


class IntervalCallback(TrainerCallback):
    """Restores the recipe's intervals of logging, evaluation and saving when a run continues, where
    the Trainer takes those of the checkpoint; and ends every run with a validation loss.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        last = state.global_step >= state.max_steps
        if last and args.eval_strategy != IntervalStrategy.NO:
            control.should_evaluate = True


class MetricsCallback(TrainerCallback):
    """Appends what is logged to `metrics.jsonl` and sends it to the caller.

    A run that continues first drops the entries after its checkpoint, which it will write again.

    Args:
        folder: of the run.
        send: called with each entry and, at other steps, with the step.

    Attributes:
        entries: those of the file.
    """

    def __init__(self, folder: Path, send: Callable[[Event], None]) -> None:
        self.path = folder / METRICS
        self.send = send
        self.entries: list[dict[str, Any]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            self.entries = [e for e in read_metrics(self.path) if e["step"] <= state.global_step]
            write_metrics(self.path, self.entries)

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
        append_metrics(self.path, entry)
        self.entries.append(entry)
        self.send({"kind": "log", **entry})

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # A checkpoint is committed after this: what it continues from must be on disk before.
        if state.is_world_process_zero:
            sync_metrics(self.path)


class DivergenceCallback(TrainerCallback):
    """Stops a run whose loss is no number, or stays far above its best.

    The Trainer logs before it saves, and a run logs whenever it saves, so no checkpoint is written
    of a step with such a loss.

    Args:
        above: nats by which the mean of the last `losses` logged losses may exceed the lowest such
            mean; 0 disables the check. NaN and infinity always stop the run.
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


class CheckpointCallback(TrainerCallback):
    """Commits what the Trainer wrote in a staging folder as a checkpoint, and removes old ones.

    Args:
        staging: folder in which the Trainer writes.
        run: folder of the run, with its checkpoints.
        keep: number of checkpoints to retain.
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


class SwitchCallback(TrainerCallback):
    """Gives a model another attention before the step that follows the first `steps`.

    Args:
        model: the model.
        attention: what it gets.
        steps: steps with the attention that it has.
        then: called after the change.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attention: AttentionChoice,
        steps: int,
        then: Callable[[], None],
    ) -> None:
        self.model, self.attention, self.steps, self.then = model, attention, steps, then

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step == self.steps:
            self.attention.apply(self.model)
            self.then()


class TimeLimitCallback(TrainerCallback):
    """Saves and stops after `minutes`; the same command continues."""

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
    """True if `here` is true on any rank: clocks differ, and ranks must stop together."""
    if not torch.distributed.is_initialized():
        return here
    found = torch.tensor(float(here), device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return bool(found.item())


class OrderCallback(TrainerCallback):
    """Adds `order` to what is logged: a digest of all tokens that the model was trained on so far.

    Equal digests mean equal data in equal order. It listens at the model itself, so that no loader,
    worker or prefetching stands in between. A run that resumes starts with the digest of its
    checkpoint: a run logs whenever it saves.
    """

    def __init__(self) -> None:
        self.digest = ""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **_: Any,
    ) -> None:
        assert model is not None
        found = [entry["order"] for entry in state.log_history if "order" in entry]
        self.digest = found[-1] if found else ""
        self._hook = model.register_forward_pre_hook(self._listen, with_kwargs=True)

    def _listen(self, model: torch.nn.Module, args: Any, keywords: Mapping[str, Any]) -> None:
        if model.training:
            tokens = keywords["input_ids"].cpu().contiguous().numpy()
            self.digest = hashlib.sha256(self.digest.encode() + tokens.tobytes()).hexdigest()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if logs is not None and "loss" in logs:
            logs["order"] = state.log_history[-1]["order"] = self.digest

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._hook.remove()
