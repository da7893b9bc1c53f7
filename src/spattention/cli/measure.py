"""Measuring on a GPU: times by graph replay and by eager calls, host time, memory, and where it was
measured.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]

FIRST_CALL = """
import sys, time, torch
import spattention as spa
from spattention.impl import triton

shape, dtype = (1, 8, 256, int(sys.argv[1])), getattr(torch, sys.argv[2])
inputs = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]
pattern = spa.BandPattern.shared_local(8, 256)
torch.cuda.synchronize()
times = [time.perf_counter()]
out = spa.band_attention(*inputs, pattern, impl="triton")
torch.cuda.synchronize()
times.append(time.perf_counter())
torch.autograd.grad(out, inputs, torch.randn_like(out))
torch.cuda.synchronize()
times.append(time.perf_counter())
print(f"{times[1] - times[0]:.1f} s forward, {times[2] - times[1]:.1f} s backward")
"""


def graph_milliseconds(call: Call, budget: float = 20.0) -> float:
    """Median time of replays of a captured call: the GPU's own time, without the host's.

    Args:
        call: what is measured; it must be capturable and is warmed up here.
        budget: about how long to replay, in milliseconds; at least 9 and at most 60 replays.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return _median_milliseconds(graph.replay, budget)


def eager_milliseconds(call: Call, budget: float = 20.0) -> float:
    """Median time of plain calls between events; where the host is slower than the GPU, the host's
    time.
    """
    for _ in range(2):
        call()
    return _median_milliseconds(call, budget)


def host_microseconds(call: Call, calls: int = 200) -> float:
    """Mean time that a call keeps the host busy; the GPU's work must be short."""
    for _ in range(10):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    elapsed = time.perf_counter() - begin
    torch.cuda.synchronize()
    return elapsed / calls * 1e6


def first_call(head_dim: int, dtype: str) -> str:
    """Compile time of a first call, forward and backward, in a process of its own with an empty
    cache of kernels.
    """
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-c", FIRST_CALL, str(head_dim), dtype]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()


def peak_bytes(call: Call) -> int:
    """The most memory that a call holds at once, beyond what was held before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def environment() -> dict[str, str]:
    """GPU, versions, and the commit of this checkout."""
    found = {"gpu": torch.cuda.get_device_name(), "python": platform.python_version()}
    for package in ("torch", "triton", "spattention"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["cuda"] = str(torch.version.cuda)
    found["commit"] = _commit()
    return found


def _median_milliseconds(call: Call, budget: float) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once() -> float:
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    once()
    repeats = max(9, min(60, int(budget / max(once(), 1e-3))))
    return statistics.median(once() for _ in range(repeats))


def _commit() -> str:
    here = Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(
            command, cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
