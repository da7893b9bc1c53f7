"""One of several processes of a benchmark: its device, and how it measures."""

from __future__ import annotations

import os
import statistics
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

Row = dict[str, Any]
IN_A_ROW = 3  # runs of one measurement


class Machine:
    """This process's device, and how it measures."""

    def __init__(self, device: str) -> None:
        self.rank, self.ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.cuda = device == "cuda"
        self.device = torch.device(device)
        if self.cuda:
            self.device = torch.device(device, int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        dist.init_process_group("nccl" if self.cuda else "gloo", timeout=timedelta(seconds=120))

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], repetitions: int, together: bool = True) -> float:
        """Median time of a run, of which a few follow one another without a pause, as layers do;
        of the slowest rank if all run it together."""
        found = []
        for repetition in range(repetitions + 2):
            self.wait()
            if together:
                dist.barrier()
            start = time.perf_counter()
            for _ in range(IN_A_ROW):
                run()
            self.wait()
            mean = (time.perf_counter() - start) / IN_A_ROW
            took = torch.tensor(mean, device=self.device)
            if together:
                dist.all_reduce(took, dist.ReduceOp.MAX)
            if repetition >= 2:
                found.append(took.item())
        return statistics.median(found)

    def forget_peak(self) -> float:
        """Start to watch memory; GiB that are in use now."""
        if not self.cuda:
            return 0.0
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30

    def peak(self, base: float) -> float:
        """Largest memory beyond `base` since then, in GiB, of the rank that needed most."""
        most = torch.cuda.max_memory_allocated() / 2**30 - base if self.cuda else 0.0
        held = torch.tensor(most, device=self.device)
        dist.all_reduce(held, dist.ReduceOp.MAX)
        return held.item()

    def alone(self, run: Callable[[], Any]) -> Any:
        """The result of a run on rank 0, on every rank, while the others wait; its error too."""
        found: list[Any] = [None, None]
        if self.rank == 0:
            try:
                found[0] = run()
            except Exception as error:  # raised on all ranks, none of which may wait for more
                traceback.print_exc()
                found[1] = f"{type(error).__name__}: {error}"
        dist.broadcast_object_list(found, src=0, device=self.device if self.cuda else None)
        if found[1]:
            raise RuntimeError(found[1])
        return found[0]
