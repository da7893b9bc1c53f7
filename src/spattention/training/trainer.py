"""Transformers' Trainer over packed windows of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from ..compat.huggingface import to_device
from ..data.tokens import IGNORED
from .graphs import PassGraph

ITEMS = "num_items_in_batch"


def make_trainer(
    model: PreTrainedModel,
    arguments: TrainingArguments,
    train: Dataset[Any],
    validation: Dataset[Any] | None,
    callbacks: Sequence[TrainerCallback],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    without_graph: Callable[[str], None] | None = None,
) -> Trainer:
    """A Trainer over windows, silent except for the callbacks given.

    Args:
        model: model to train.
        arguments: result of `recipe_arguments`.
        train: training windows.
        validation: windows of the validation loss.
        callbacks: callbacks, in the order in which they are called.
        optimizer: optimizer to use instead of the one that `arguments` describe.
        tokenizer: tokenizer to save next to the model.
        without_graph: record passes as a CUDA graph, and call this with the reason where they run
            without it; None records none.
    """
    trainer = _PerToken(
        model=model,
        args=arguments,
        data_collator=_collate,
        train_dataset=train,
        eval_dataset=None if validation is None else _Whole(validation, _at_once(arguments)),
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
        processing_class=tokenizer,
    )
    # Only tensors of two and more dimensions decay, as in `precision.groups`: sinks do not.
    trainer.get_decay_parameter_names = _decaying
    ddp = trainer.accelerator.ddp_handler
    if ddp is not None:
        # Gradients lie in the buckets that DDP exchanges: no copies there and back, and no memory
        # for them twice. `TrainingArguments` have no word for it.
        ddp.gradient_as_bucket_view = True
    trainer.remove_callback(PrinterCallback)  # the callbacks given show what there is to see
    if without_graph is not None:
        trainer.graph = PassGraph(trainer.run_pass, model.parameters(), without_graph)
    # The Trainer turns the cache off in the config, from where it would get into what is saved;
    # `_collate` turns it off for training alone.
    model.config.use_cache = True
    return trainer


def forget_graph(trainer: Trainer) -> None:
    """Have a result of `make_trainer` record its passes again, if it does, for a changed model."""
    if isinstance(trainer, _PerToken) and trainer.graph is not None:
        trainer.graph.forget()


class _PerToken(Trainer):
    """A Trainer whose validation loss is the mean over all predicted tokens, and whose passes may
    be a CUDA graph.

    The Trainer's own loss is a mean of the batches' means. It depends on how windows fall into
    batches, and on how often windows are repeated to fill the last ones of several devices.
    """

    graph: PassGraph | None = None
    _summed: torch.Tensor  # losses, and how many

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        if self.graph is None:
            return super().training_step(model, inputs, num_items_in_batch)
        return self.graph(to_device(self, {**inputs, ITEMS: num_items_in_batch}))

    def run_pass(self, inputs: dict[str, Any]) -> torch.Tensor:
        """A forward and backward pass as the Trainer makes it; the detached loss."""
        rest = {name: value for name, value in inputs.items() if name != ITEMS}
        return super().training_step(self.model_wrapped, rest, inputs[ITEMS])

    def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        inputs = to_device(self, inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**inputs).loss.detach()  # the mean of this device's tokens
        count = (inputs["labels"][:, 1:] != IGNORED).sum().cpu().double()
        self._summed += torch.stack([loss.cpu().double() * count if count else count, count])
        return loss, None, None

    def evaluation_loop(self, *rest: Any, metric_key_prefix: str = "eval", **more: Any) -> Any:
        self._summed = torch.zeros(2, dtype=torch.float64)
        found = super().evaluation_loop(*rest, metric_key_prefix=metric_key_prefix, **more)
        summed = self._summed
        if self.args.world_size > 1:
            summed = summed.to(self.args.device)
            torch.distributed.all_reduce(summed)
        found.metrics[f"{metric_key_prefix}_loss"] = float(summed[0] / summed[1])
        return found


class _Whole(Dataset[Any]):
    """Pads the validation set with fully ignored windows to a multiple of the global batch.

    Otherwise Accelerate fills the last batch by repeating real windows, which biases the loss.
    """

    def __init__(self, windows: Dataset[Any], multiple: int) -> None:
        self.windows = windows
        self.count = len(windows)  # type: ignore[arg-type]
        self.length = -(-self.count // multiple) * multiple

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        if index < self.count:
            return self.windows[index]
        first = self.windows[0]
        return {**first, "labels": torch.full_like(first["labels"], IGNORED)}


def _at_once(arguments: TrainingArguments) -> int:
    """Number of windows that all devices evaluate at once; 1 on one device, which pads nothing."""
    devices = arguments.world_size
    return arguments.per_device_eval_batch_size * devices if devices > 1 else 1


def _decaying(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.dim() >= 2]


def _collate(windows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    return {**default_data_collator(windows), "use_cache": False}
