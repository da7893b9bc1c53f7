"""Train with FSDP2, context and tensor parallelism together, through Transformers.

torchrun --nproc-per-node 8 examples/many_gpus.py      # eight GPUs, or processes on a CPU
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import small
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import spattention as spa

CONTEXT_RANKS, TENSOR_RANKS = 2, 2


def save_model(folder: Path) -> None:
    """A model with bands, in the place of yours."""
    model = small.dense_model()
    pattern = spa.BandPattern.shared_local(small.HEADS, small.CONTEXT, widths="geometric", local=32)
    spa.hf.apply(model, pattern).save_pretrained(folder)


def train(folder: Path, steps: int) -> list[float]:
    """The loss of every step, over the rows of all ranks."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    rows_at_once = dist.get_world_size() // (CONTEXT_RANKS * TENSOR_RANKS)
    shape = (rows_at_once, CONTEXT_RANKS, TENSOR_RANKS)
    mesh = dist.init_device_mesh(device, shape, mesh_dim_names=("dp", "cp", "tp"))

    spa.hf.register()
    # FSDP2 shards over `dp` and `cp` together, which averages the gradients of both.
    ways = DistributedConfig(fsdp_size=rows_at_once * CONTEXT_RANKS, tp_size=TENSOR_RANKS)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=ways).train()
    spa.hf.context_parallel(model, mesh["cp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    data = torch.tensor([row["input_ids"] for row in small.rows(steps * rows_at_once)])
    losses = []
    for batch in data.to(device).split(rows_at_once):
        # A row of its own for each rank of `dp`, the same on all ranks of `cp` and `tp`.
        row = batch[mesh["dp"].get_local_rank()][None]
        loss = model(input_ids=row, labels=row, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses


def main(steps: int = 10) -> list[float]:
    dist.init_process_group()
    with tempfile.TemporaryDirectory() as folder:
        places = [folder]
        dist.broadcast_object_list(places, src=0)
        if dist.get_rank() == 0:
            save_model(Path(places[0]))
        dist.barrier()
        losses = train(Path(places[0]), steps)
        dist.barrier()
    return losses


if __name__ == "__main__":
    found = main()
    if dist.get_rank() == 0:
        print(f"loss {found[0]:.3f} in the first step, {found[-1]:.3f} in the last")
    dist.destroy_process_group()
