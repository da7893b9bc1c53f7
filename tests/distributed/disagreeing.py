"""Ranks that are about to do different things, and a rank that dies; run by torchrun, and as a
script of two processes for `dying`."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from spattention import BandPattern, hf
from spattention.parallel import Shards, plan_exchange, sharded_attention

TIMEOUT = 4  # seconds
LENGTH = 16


def attend(length=LENGTH, pattern=None, shards=None, tokens=None, dtype=torch.float32) -> None:
    pattern = BandPattern.exclusive(2, length) if pattern is None else pattern
    shards = Shards.balanced(length, 2) if shards is None else shards
    tokens = shards.sizes[dist.get_rank()] if tokens is None else tokens
    q = torch.randn(1, 2, tokens, 4, dtype=dtype)
    sharded_attention(q, q, q, plan_exchange(pattern, shards, 2))


def message(**arguments) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        attend(**arguments)
    return str(caught.value)


def disagree() -> None:
    """Each time with a length that no rank has seen before, as in the first step of a run."""
    second = dist.get_rank() == 1
    attend()
    found = message(length=20, pattern=BandPattern.dense(2, 20) if second else None)
    assert found.startswith("`pattern` must be the same on every rank, got "), found
    assert "on rank 0 and " in found, found
    assert "dense" in found, found
    assert found.endswith("on rank 1"), found
    found = message(length=24, shards=Shards.balanced(20, 2) if second else None)
    assert found == "`length` must be the same on every rank, got 24 on rank 0 and 20 on rank 1"
    found = message(length=32, shards=Shards.contiguous(32, 2) if second else None)
    assert found == (
        "`shards` must be the same on every rank, got (((0, 8), (24, 32)), ((8, 24),)) on rank 0 "
        "and (((0, 16),), ((16, 32),)) on rank 1"
    ), found
    found = message(length=36, tokens=17 if second else None)
    assert found == "`query` must have the 18 tokens of rank 1's shard, got 17 (on rank 1)", found
    found = message(length=40, dtype=torch.float64 if second else torch.float32)
    assert found.startswith("`dtype` must be the same on every rank, got torch.float32"), found
    found = message(shards=Shards.balanced(LENGTH, 3), tokens=4)
    assert found.startswith("`plan` must be for the 2 ranks of `group`, got shards of 3"), found
    attend()  # nothing is left over from an error
    rows(second)


def rows(second: bool) -> None:
    """A data loader that gives ranks different rows is told before anything is exchanged."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "hf"))
    import tiny

    mesh = dist.init_device_mesh("cpu", (2,))
    model = hf.context_parallel(tiny.banded("llama"), mesh)
    with pytest.raises(ValueError, match="`input_ids` must be the same on every rank, got"):
        model(tiny.tokens(1, 16, seed=int(second)))
    ids = tiny.tokens(1, 16)
    mask = torch.ones_like(ids)
    mask[0, :3] = int(not second)  # padding on one rank alone: the other must not wait for it
    with pytest.raises(ValueError, match=r"got padding: .* \(on rank 1\)"):
        model(ids, attention_mask=mask)
    if second:
        model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r'got "sdpa" in layer 0: .* \(on rank 1\)'):
        model(ids)


def _one(rank: int, store: str) -> None:
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, 2),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=TIMEOUT),
    )
    attend()
    if rank == 1:
        os._exit(3)
    start = time.monotonic()
    try:
        attend()
    except RuntimeError as error:
        print(f"ended after {time.monotonic() - start:.0f} s: {error}", flush=True)
    os._exit(0)  # threads of gloo that still wait for the dead rank may abort a usual exit


def dying() -> None:
    """The rank that is left ends within the timeout."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        processes = [context.Process(target=_one, args=(r, f"{folder}/store")) for r in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        codes = [process.exitcode for process in processes]
        assert codes == [0, 3], codes


def main() -> None:
    if "dying" in sys.argv:
        dying()
        return
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    disagree()
    if dist.get_rank() == 0:
        print("every disagreement was told")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
