"""Callbacks of the Trainer: speed, metrics, divergence, checkpoints, time, losses."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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
    """Restores the recipe's intervals of logging, evaluation and saving when a run continues.

    The Trainer takes those of the checkpoint.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)


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


class LossRecorder(TrainerCallback):
    """Collects the losses of a run in memory and sends them as plain dictionaries.

    Args:
        tokens_per_step: tokens per step.
        send: called with `{"kind": "step" | "train" | "validation", "step": int, ...}`.

    Attributes:
        train_losses: `(step, loss)`, each the mean since the one before.
        validation_losses: `(step, loss)`.
    """

    # The first steps allocate and warm up: they say nothing about speed.
    warm_up = 3

    def __init__(self, tokens_per_step: int, send: Callable[[Event], None]) -> None:
        self.tokens_per_step = tokens_per_step
        self.send = send
        self.train_losses: list[tuple[int, float]] = []
        self.validation_losses: list[tuple[int, float]] = []
        self._seconds: list[float] = []
        self._began = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of the median step; evaluation is not counted."""
        return self._speed(self._seconds[self.warm_up :])

    def _speed(self, seconds: Sequence[float]) -> float:
        return self.tokens_per_step / median(seconds or self._seconds)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds.append(time.perf_counter() - self._began)
        speed = self._speed(self._seconds[self.warm_up :][-50:])
        self.send({"kind": "step", "step": state.global_step, "speed": speed})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        for name, kind, losses in (
            ("loss", "train", self.train_losses),
            ("eval_loss", "validation", self.validation_losses),
        ):
            if logs is None or name not in logs:
                continue
            loss = float(logs[name])
            losses.append((state.global_step, loss))
            self.send({"kind": kind, "step": state.global_step, "loss": loss})
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the {kind} loss became {loss} at step {state.global_step}"
                )


class OrderDigest:
    """A digest of the tokens that a model trains on; equal ones mean equal data in equal order.

    It listens at the model itself, so that no loader, worker or prefetching stands in between.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._found = hashlib.sha256()
        self._hook = model.register_forward_pre_hook(self._listen, with_kwargs=True)

    def _listen(self, model: torch.nn.Module, args: Any, keywords: Mapping[str, Any]) -> None:
        if model.training:
            self._found.update(keywords["input_ids"].cpu().contiguous().numpy())

    def close(self) -> str:
        """Stop listening and return the SHA-256 in hexadecimal."""
        self._hook.remove()
        return self._found.hexdigest()
