"""Arguments of Transformers' Trainer: for any run, and for one by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import get_int_from_env
from transformers import TrainingArguments

from .precision import sharded_precision
from .recipe import Recipe


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
    """Arguments for AdamW with warm-up and cosine decay; the Trainer prints and saves nothing.

    Args:
        folder: folder in which the Trainer may write.
        steps: optimizer steps.
        batch: windows per device and pass.
        learning_rate: peak learning rate; it decays to a tenth.
        warmup: steps of linear warm-up.
        seed: RNG seed of the Trainer.
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


def recipe_arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    """The arguments for a recipe; they also join the processes that torchrun launched.

    Args:
        recipe: what is trained.
        folder: where the Trainer writes its checkpoints.

    Raises:
        ValueError: if the recipe does not go with this machine or launch.
    """
    more: dict[str, Any] = {}
    by_torchrun = get_int_from_env(["WORLD_SIZE"], 0)  # processes; 0 without it
    launched = max(by_torchrun, 1)
    if launched > 1 and not torch.cuda.is_available():
        # Without it Accelerate does not join the processes, and each trains alone.
        more["use_cpu"] = True
    if recipe.parallel == "fsdp2":
        if not torch.cuda.is_available():
            # Accelerate would copy the model instead, without a word.
            raise ValueError('`parallel` must be "ddp" on the CPU, got "fsdp2"')
        if not by_torchrun:
            raise ValueError(
                '`parallel` = "fsdp2" needs `torchrun -m spattention train ...`, also for one '
                "process"
            )
        more["bf16"] = recipe.precision == "bfloat16"
        more["fsdp"] = True
        more["fsdp_config"] = {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "reshard_after_forward": True,
            "activation_checkpointing": recipe.checkpointing,
            "state_dict_type": "FULL_STATE_DICT",  # what `from_pretrained` opens
        }
    if recipe.shard_size:
        more["parallelism_config"] = _groups(recipe, launched)
    arguments = make_arguments(
        folder,
        steps=recipe.steps,
        batch=recipe.micro_batch,
        learning_rate=recipe.learning_rate,
        warmup=recipe.warmup,
        seed=recipe.seed,
        lr_scheduler_kwargs={"min_lr_rate": recipe.final_learning_rate},
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.beta1,
        adam_beta2=recipe.beta2,
        adam_epsilon=recipe.epsilon,
        max_grad_norm=recipe.clip,
        train_sampling_strategy="sequential",  # `InOrder` has the order
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=recipe.log_every,
        eval_strategy="steps",
        eval_steps=recipe.evaluate_every,
        save_strategy="steps",
        save_steps=recipe.save_every,
        ddp_find_unused_parameters=False,
        **more,
    )
    if arguments.fsdp_plugin_args is not None:  # Accelerate's; the Trainer has no word for this one
        arguments.fsdp_plugin_args["mixed_precision_policy"] = sharded_precision(recipe.precision)
    if arguments.n_gpu > 1:
        raise ValueError(
            f"several GPUs need one process each: `torchrun --nproc-per-node {arguments.n_gpu} -m "
            "spattention train ...`, or CUDA_VISIBLE_DEVICES to use one"
        )
    if arguments.world_size != launched:
        raise RuntimeError(f"{launched} processes were launched, {arguments.world_size} joined")
    return arguments


def _groups(recipe: Recipe, devices: int) -> Any:
    """Accelerate's setting for shards within groups of devices and copies between the groups."""
    from accelerate import ParallelismConfig

    if recipe.parallel != "fsdp2" or devices % recipe.shard_size:
        raise ValueError(
            '`shard_size` must divide the number of devices under `parallel` = "fsdp2", got '
            f'{recipe.shard_size} on {devices} devices under "{recipe.parallel}"'
        )
    return ParallelismConfig(
        dp_replicate_size=devices // recipe.shard_size, dp_shard_size=recipe.shard_size
    )
