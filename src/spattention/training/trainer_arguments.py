"""Arguments of Transformers' Trainer for a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import get_int_from_env
from transformers import TrainingArguments

from .precision import sharded_precision
from .recipe import Recipe


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
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.micro_batch,
        per_device_eval_batch_size=recipe.micro_batch,
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.final_learning_rate},
        seed=recipe.seed,
        data_seed=recipe.seed,
        optim="adamw_torch_fused",
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.beta1,
        adam_beta2=recipe.beta2,
        adam_epsilon=recipe.epsilon,
        max_grad_norm=recipe.clip,
        train_sampling_strategy="sequential",  # `InOrder` has the order
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_strategy="steps",
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=recipe.evaluate_every,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=recipe.save_every,
        ddp_find_unused_parameters=False,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
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
