"""FSDP2, context and tensor parallelism together beside one process; run by torchrun with a folder
that all ranks may use.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from spattention import hf

sys.path.insert(0, str(Path(__file__).parents[1] / "hf"))
import tiny

STEPS, LENGTH, RATE = 3, 27, 0.5
CONTEXT_RANKS, TENSOR_RANKS = 2, 2
CLOSE = {"rtol": 0.0, "atol": 2e-6}  # Transformers computes losses in float32


def load(folder: Path, **how):
    kind = AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager", **how)
    return model.train()


def step(model, optimizer, ids: torch.Tensor) -> torch.Tensor:
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def check(family: str, folder: Path) -> None:
    rows = dist.get_world_size() // (CONTEXT_RANKS * TENSOR_RANKS)
    mesh = dist.init_device_mesh(
        "cpu", (rows, CONTEXT_RANKS, TENSOR_RANKS), mesh_dim_names=("dp", "cp", "tp")
    )
    if dist.get_rank() == 0:
        tiny.banded(family, num_key_value_heads=4).save_pretrained(folder)
    dist.barrier()
    ways = DistributedConfig(fsdp_size=rows * CONTEXT_RANKS, tp_size=TENSOR_RANKS)
    whole, split = load(folder), load(folder, distributed_config=ways)
    hf.context_parallel(split, mesh["cp"])
    optimizers = [torch.optim.SGD(model.parameters(), RATE) for model in (whole, split)]
    for number in range(STEPS):
        ids = tiny.tokens(rows, LENGTH, seed=number)
        mine = ids[mesh["dp"].get_local_rank()][None]
        wanted = step(whole, optimizers[0], ids)
        found = step(split, optimizers[1], mine)
        dist.all_reduce(found)
        torch.testing.assert_close(found / dist.get_world_size(), wanted, **CLOSE)
    weights = dict(whole.named_parameters())
    shards = set()
    for name, parameter in split.named_parameters():
        assert isinstance(parameter, DTensor), name
        shards.add(parameter.to_local().numel() * dist.get_world_size() == parameter.numel())
        torch.testing.assert_close(parameter.full_tensor(), weights[name], msg=name, **CLOSE)
    assert True in shards, "no weight is shared out to all ranks"


def main() -> None:
    dist.init_process_group("gloo")
    hf.register()
    for family in ("llama", "qwen3", "olmoe"):
        check(family, Path(sys.argv[1]) / family)
    if dist.get_rank() == 0:
        print(f"three ways on {dist.get_world_size()} ranks equal one process")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
