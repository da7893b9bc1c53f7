"""Transformers' Trainer, set up for packed windows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ..data.tokens import Windows
from .settings import Settings


def make_trainer(
    model: PreTrainedModel,
    train: Windows,
    validation: Windows,
    settings: Settings,
    seed: int,
    folder: Path,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    """A Trainer whose order of windows depends on `seed` and the data alone, never on the model.

    Args:
        model: what is trained.
        train: training windows.
        validation: windows that the validation loss is taken over.
        settings: steps, batch and learning rate.
        seed: of the order of the windows.
        folder: where the Trainer may write; nothing is saved there by itself.
        callbacks: what watches it.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=max(1, settings.steps // 10),
        optim="adamw_torch_fused",
        adam_beta2=0.98,  # short runs: the average over 1 / (1 - 0.98) = 50 steps
        weight_decay=0.1,
        max_grad_norm=1.0,
        logging_strategy="steps",
        logging_steps=max(1, settings.steps // 60),
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=max(1, -(-settings.steps // settings.evaluations)),
        save_strategy="no",
        prediction_loss_only=True,
        seed=seed,
        data_seed=seed,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        log_level="error",
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)  # the callbacks given show what there is to see
    return trainer
