"""Two processes with a GPU each (NCCL): attention on shards, ranks that disagree, a rank that dies.

Run by torchrun with `attend` or `disagree`, and as a script of two processes with `dying`.
"""

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

from spattention import BandPattern
from spattention.parallel import (
    Shards,
    gathered_attention,
    plan_exchange,
    sharded_attention,
    ulysses_attention,
)
from spattention.testing import Case, check_error, exact, noise, plain

LENGTH, HEADS = 2048, 8  # equal shards
TIMEOUT = 10  # seconds
REPORT = 90  # seconds that NCCL's watchdog may take for its report before it ends a process
PATTERNS = {
    "geometric": BandPattern.shared_local(HEADS, LENGTH, widths="geometric", first=20, local=90),
    "dense": BandPattern.dense(HEADS, LENGTH),
    "prefix": BandPattern.shared_local(HEADS, LENGTH, local=50, prefix=70),
}
DOCUMENTS = (0, 300, 611, 1000, 1400, 1750)
NAMES = ("out", "d_query", "d_key", "d_value")


def first_keys(starts: tuple[int, ...]) -> torch.Tensor:
    """int32 `[1, LENGTH]`: the first token of each query's document."""
    rows = torch.tensor(starts, dtype=torch.int32, device="cuda")
    places = torch.arange(LENGTH, device="cuda")
    return rows[torch.searchsorted(rows, places, right=True) - 1][None]


def check(name: str, key_heads: int, packed: bool, token_major: bool) -> None:
    """Every way is within the budget of one call over all keys."""
    generator = torch.Generator("cuda").manual_seed(0)
    drawn = [
        torch.randn(1, heads, LENGTH, 128, generator=generator, device="cuda").to(torch.bfloat16)
        for heads in (HEADS, key_heads, key_heads, HEADS)
    ]
    options = {"key_start": first_keys(DOCUMENTS)} if packed else {}
    case = Case(*drawn[:3], PATTERNS[name], options)
    grads = drawn[3], torch.zeros(1, HEADS, LENGTH, device="cuda")
    truth, rough, deviations = exact(case, grads), plain(case, grads), noise(case, grads)
    ways = [(sharded_attention, Shards.balanced), (sharded_attention, Shards.contiguous)]
    if not token_major:
        ways += [(ulysses_attention, Shards.balanced), (gathered_attention, Shards.balanced)]
    for attend, layout in ways:
        shards = layout(LENGTH, 2)
        plan = plan_exchange(
            PATTERNS[name], shards, key_heads, documents=[DOCUMENTS] if packed else None
        )
        *inputs, d_out = (shards.split(each, dist.get_rank(), dim=2) for each in drawn)
        if token_major:  # as models hand them over
            inputs = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in inputs]
        inputs = [each.requires_grad_() for each in inputs]
        for _ in range(3):  # calls in a row, as layers are
            out = attend(*inputs, plan)
            found = [out.detach(), *torch.autograd.grad(out, inputs, d_out)]
        for label, mine in zip(NAMES, found):
            parts = [torch.empty_like(mine, memory_format=torch.contiguous_format)] * 2
            parts = [part.clone() for part in parts]
            dist.all_gather(parts, mine.contiguous())
            whole = shards.join(parts, dim=2)
            check_error(
                f"{attend.__name__}, {name}, {key_heads} key heads, {label}",
                whole,
                rough[label],
                truth[label],
                deviations[label],
            )


def attend() -> None:
    for name in PATTERNS:
        for key_heads in (8, 2):
            check(name, key_heads, packed=False, token_major=False)
    check("geometric", 2, packed=True, token_major=False)
    check("geometric", 8, packed=False, token_major=True)


def disagree() -> None:
    """Ranks that are about to do different things are told on both, before anything travels."""
    second = dist.get_rank() == 1
    q = torch.randn(1, 2, 8, 64, device="cuda", dtype=torch.bfloat16)
    patterns = BandPattern.exclusive(2, 16), BandPattern.dense(2, 16)
    plans = [plan_exchange(each, Shards.balanced(16, 2), 2) for each in patterns]
    with pytest.raises(ValueError, match="`pattern` must be the same on every rank, got"):
        sharded_attention(q, q, q, plans[second])
    with pytest.raises(ValueError, match=r"got 7 \(on rank 1\)"):
        sharded_attention(*[q[:, :, : 7 if second else 8]] * 3, plans[0])
    sharded_attention(q, q, q, plans[0])  # nothing is left over from an error


def _one(rank: int, store: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl",
        store=dist.FileStore(store, 2),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=TIMEOUT),
    )
    q = torch.randn(1, 2, 8, 64, device="cuda", dtype=torch.bfloat16)
    plan = plan_exchange(BandPattern.exclusive(2, 16), Shards.balanced(16, 2), 2)
    sharded_attention(q, q, q, plan)
    torch.cuda.synchronize()
    if rank == 1:
        os._exit(3)
    sharded_attention(q, q, q, plan)
    torch.cuda.synchronize()


def dying() -> None:
    """The rank that is left ends, with an error, soon after the timeout."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        processes = [context.Process(target=_one, args=(r, f"{folder}/store")) for r in range(2)]
        for process in processes:
            process.start()
        processes[1].join(60)
        start = time.monotonic()
        processes[0].join(TIMEOUT + REPORT)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
    assert codes[1] == 3, codes
    assert codes[0] not in (None, 0), codes
    print(f"ended after {time.monotonic() - start:.0f} s")


def main() -> None:
    if "dying" in sys.argv:
        dying()
        return
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", timeout=timedelta(seconds=60))
    {"attend": attend, "disagree": disagree}[sys.argv[1]]()
    if dist.get_rank() == 0:
        print(f"{sys.argv[1]} is right on two GPUs")
    dist.destroy_process_group()


if __name__ == "__main__":
    # Documents of rows of any size are looked for, as in `conftest.py`.
    from spattention.impl.triton.hopper import planning

    planning.MIN_ROW_QUERIES = 0
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
