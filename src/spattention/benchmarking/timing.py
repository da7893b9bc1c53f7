"""Times by graph replay, by eager calls and by the host's clock; memory."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
LONG_PRODUCT = 2.0  # milliseconds from which larger matrices measure the rate of products

BUDGET = 20.0  # milliseconds of a measurement
SETTLE = 400.0  # milliseconds until a busy GPU's clock is steady
CALLS = 200  # of a mean by the host's clock
COPIED = 2**30  # bytes of a copy that is timed

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


def needs_gpu(command: str) -> None:
    """Raise ValueError without a CUDA device."""
    if not torch.cuda.is_available():
        raise ValueError(f"`spattention {command}` needs a CUDA device, and there is none")


def graph_milliseconds(call: Call, budget: float = BUDGET, rest: float = 0.0) -> float:
    """Median time of replays of a captured call: the GPU's own time, without the host's. Short ones
    are replayed several times between two events, because a single one would begin some
    microseconds after its event, when the host has launched it.

    Args:
        call: what is measured; it must be capturable and is warmed up here.
        budget: about how long to replay, in milliseconds; at least 9 and at most 60 times.
        rest: seconds to wait before, so that what ran earlier has not used up the GPU's power.
    """
    replay = _captured(call)
    time.sleep(rest)
    return _median_milliseconds(replay, budget, together=1.0)


def busy_milliseconds(call: Call) -> float:
    """Mean time of replays of a captured call one right after the other, on a GPU that has been
    busy with them: after some tenths of a second, its power limit may have slowed its clock.
    """
    replay = _captured(call)
    mean = _timer(replay)
    once = max(mean(3), 1e-3)
    mean(max(1, int(SETTLE / once)))
    return mean(max(3, int(SETTLE / 2 / once)))


def _timer(call: Call) -> Callable[[int], float]:
    """The mean milliseconds of calls one right after the other, by their number."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def mean(calls: int) -> float:
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / calls

    return mean


def _captured(call: Call) -> Call:
    """The replay of a call, which is warmed up first."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # a graph has a pool of its own: twice the memory, for large calls
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def eager_milliseconds(call: Call, rest: float = 0.0) -> float:
    """Median time of plain calls between events; where the host is slower than the GPU, the host's
    time. Waits `rest` seconds before.
    """
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    time.sleep(rest)
    return _median_milliseconds(call, BUDGET)


def wall_seconds(
    call: Call, repeats: int, *, warm_up: int = 1, device: torch.device | None = None
) -> float:
    """Median time of single calls by the host's clock, after some that do not count. A CUDA device
    is waited for before and after each."""
    times = []
    for _ in range(warm_up + repeats):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[warm_up:])


def synchronize(device: torch.device | None) -> None:
    """Wait for a CUDA device; the CPU is never behind."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize()


def host_microseconds(call: Call) -> float:
    """Mean time that a call keeps the host busy; the GPU's work must be short."""
    for _ in range(10):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    elapsed = time.perf_counter() - begin
    torch.cuda.synchronize()
    return elapsed / CALLS * 1e6


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


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors that a cache of Transformers holds for its layers."""
    return sum(t.nbytes for layer in cache.layers for t in _tensors(layer))


def _tensors(layer: Any) -> Iterable[Tensor]:
    # Whatever a layer stores, keys and values among it, under whatever name; each storage once.
    # Related systems keep what is not keys and values in a state with named tensors.
    state = getattr(layer, "state", None)
    held = [*vars(layer).values(), *getattr(state, "tensors", {}).values()]
    return {t.data_ptr(): t for t in held if isinstance(t, Tensor)}.values()


def copy_speed() -> float:
    """TB/s of a copy on the device, bytes read and bytes written: what memory can give. The faster
    of the copy engine's and a kernel's.
    """
    source = torch.zeros(COPIED // 4, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    engine = graph_milliseconds(lambda: target.copy_(source))
    kernel = graph_milliseconds(lambda: torch.add(source, 1.0, out=target))
    return 2 * COPIED / min(engine, kernel) / 1e9


def matrix_speed(milliseconds: float, rest: float = 0.0) -> float:
    """TFLOP/s of bfloat16 matrix products that keep the GPU busy for as long as a call takes, after
    the same rest: what its power limit leaves. Inputs are random, as zeros take less power.

    Args:
        milliseconds: duration of the call; one product of 4096 x 4096 is the shortest measured.
        rest: seconds to wait before, as in `graph_milliseconds`.
    """
    size = 8192 if milliseconds > LONG_PRODUCT else 4096
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)

    def products(count: int) -> None:
        for _ in range(count):
            torch.mm(left, right, out=out)

    once = graph_milliseconds(lambda: products(1), budget=1.0)
    count = max(1, round(milliseconds / once))
    together = graph_milliseconds(lambda: products(count), rest=rest)
    return 2 * size**3 * count / together / 1e9


def _median_milliseconds(call: Call, budget: float, together: float = 0.0) -> float:
    """Median of one call, or of as many at a time as take `together` milliseconds, at most 20."""
    mean = _timer(call)
    mean(1)
    once = max(mean(1), 1e-3)
    calls = max(1, min(20, round(together / once)))
    repeats = max(9, min(60, int(budget / (once * calls))))
    return statistics.median(mean(calls) for _ in range(repeats))
