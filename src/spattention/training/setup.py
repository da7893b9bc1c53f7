"""Transformers' Trainer, set up for packed windows of tokens: what `compare` and `train` share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
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


def make_arguments(
    folder: Path,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    warmup: int,
    seed: int,
    **more: Any,
) -> TrainingArguments:
    """AdamW with a warm-up and a cosine, and nothing that the Trainer prints or saves by itself.

    Args:
        folder: where the Trainer may write.
        steps: optimizer steps.
        batch: windows per device and pass.
        learning_rate: its peak; it falls to a tenth.
        warmup: steps in which it rises.
        seed: of the Trainer's random numbers.
        more: other arguments of `TrainingArguments`, or other values for those set here.
    """
    values: dict[str, Any] = {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "optim": "adamw_torch_fused",
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "logging_strategy": "steps",
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "prediction_loss_only": True,
        "data_seed": seed,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "log_level": "error",
    }
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        learning_rate=learning_rate,
        warmup_steps=warmup,
        seed=seed,
        **(values | more),
    )


def make_trainer(
    model: PreTrainedModel,
    arguments: TrainingArguments,
    train: Dataset[Any],
    validation: Dataset[Any] | None,
    callbacks: Sequence[TrainerCallback],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Trainer:
    """A Trainer over windows, silent but for the callbacks given.

    Args:
        model: what is trained.
        arguments: as `make_arguments` made them.
        train: training windows.
        validation: windows that the validation loss is taken over.
        callbacks: what watches it.
        optimizer: to be used instead of the one that `arguments` describe.
        tokenizer: saved beside the model.
    """
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=_collate,
        train_dataset=train,
        eval_dataset=validation,
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
        processing_class=tokenizer,
    )
    # Only tensors of two and more dimensions decay, as in `precision.groups`: sinks do not.
    trainer.get_decay_parameter_names = _decaying
    trainer.remove_callback(PrinterCallback)  # the callbacks given show what there is to see
    # The Trainer turns the cache off in the config, from where it would get into what is saved;
    # `_collate` turns it off for training alone.
    model.config.use_cache = True
    return trainer


def _decaying(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.dim() >= 2]


def _collate(windows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    return {**default_data_collator(windows), "use_cache": False}
