"""What watches a Trainer: losses, speed, and the order of the data."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

Event = dict[str, Any]


class Watch(TrainerCallback):
    """Collects what happens and sends it on as plain dictionaries.

    Args:
        tokens_per_step: tokens that one step trains on.
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
        """By the median step; evaluation is not counted."""
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
        """Stop listening; SHA-256 in hexadecimal."""
        self._hook.remove()
        return self._found.hexdigest()
