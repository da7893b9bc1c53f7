"""Train by a recipe under DDP, and print how many storages the gradients of a step have."""

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from spattention.training.pretrain import pretrain
from spattention.training.recipe import read_recipe


class Storages(TrainerCallback):
    """Counts gradients, and the storages that they lie in."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        gradients = [each.grad for each in more["model"].parameters() if each.grad is not None]
        storages = {each.untyped_storage().data_ptr() for each in gradients}
        if args.process_index == 0:
            print(f"{len(gradients)} gradients in {len(storages)} storages", flush=True)


pretrain(read_recipe(Path(sys.argv[1])), Path(sys.argv[2]), callbacks=[Storages()])
dist.destroy_process_group()
