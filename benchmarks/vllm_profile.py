"""Where the time of vLLM's decoding steps goes: the GPU's kernels, and parts of the host's work."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch

STEPS = 16
PROFILED = 2 * STEPS
LONGEST_NAME = 90


def profile(engine: Any) -> dict[str, Any]:
    """Microseconds of a step, by part of the host's work and by kernel; a step's launches in order.

    The host's parts overlap: one may be inside another.
    """
    host: defaultdict[str, float] = defaultdict(float)
    begin = time.perf_counter()
    with timed_parts(engine, host):
        for _ in range(STEPS):
            engine.step()
    wall = 1e6 * (time.perf_counter() - begin) / STEPS
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(STEPS):
            engine.step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found = {"host_a_step": wall, "host_parts": {n: 1e6 * s / STEPS for n, s in host.items()}}
    return found | of_kernels(events)


def of_kernels(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What the GPU did, by the events of a trace of `STEPS` steps."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    launches = sorted((e for e in events if e.get("cat") in kinds), key=lambda e: float(e["ts"]))
    if not launches:
        return {}
    times: defaultdict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    busy, until = 0.0, 0.0
    for event in launches:
        name, begin = event["name"][:LONGEST_NAME], float(event["ts"])
        times[name] += float(event["dur"])
        counts[name] += 1
        end = begin + float(event["dur"])
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    starts = [i for i, event in enumerate(launches) if event["name"] == launches[0]["name"]]
    middle = launches[len(launches) // 2 : len(launches) // 2 + len(launches) // STEPS]
    return {
        "gpu_span_a_step": (until - float(launches[0]["ts"])) / STEPS,
        "gpu_busy_a_step": busy / STEPS,
        "launches_a_step": len(launches) / STEPS,
        "first_kernel_every": statistics.median(
            float(launches[b]["ts"]) - float(launches[a]["ts"]) for a, b in zip(starts, starts[1:])
        )
        if len(starts) > 1
        else None,
        "kernels": [
            [name, round(total / STEPS, 2), counts[name] / STEPS]
            for name, total in sorted(times.items(), key=lambda entry: -entry[1])[:40]
        ],
        "one_step": [
            [
                event["name"][:40],
                round(float(event["ts"]) - float(middle[0]["ts"]), 2),
                round(float(event["dur"]), 2),
                event.get("args", {}).get("stream"),
            ]
            for event in middle
        ],
    }


@contextmanager
def timed_parts(engine: Any, seconds: defaultdict[str, float]) -> Iterator[None]:
    """Add the host's time in some of vLLM's functions to `seconds`, by name."""
    core = engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    parts: list[tuple[Any, str]] = [
        (core.scheduler, "schedule"),
        (core.scheduler, "update_from_output"),
        (core.scheduler.kv_cache_manager, "allocate_slots"),
        (core.model_executor, "execute_model"),
        (core.model_executor, "sample_tokens"),
        (runner, "prepare_inputs"),
        (runner, "prepare_attn"),
        (runner, "sample"),
        (getattr(runner, "model_state", None), "prepare_attn"),
        (getattr(runner, "block_tables", None), "apply_staged_writes"),
        (torch.cuda.CUDAGraph, "replay"),
    ]
    replaced = []
    for owner, name in parts:
        if owner is None or not hasattr(owner, name):
            continue
        replaced.append((owner, name, name in vars(owner), getattr(owner, name)))
        label = f"{getattr(owner, '__name__', type(owner).__name__)}.{name}"
        setattr(owner, name, _timed(replaced[-1][3], label, seconds))
    try:
        yield
    finally:
        for owner, name, own, plain in replaced:
            if own:
                setattr(owner, name, plain)
            else:
                delattr(owner, name)


def _timed(
    plain: Callable[..., Any], label: str, seconds: defaultdict[str, float]
) -> Callable[..., Any]:
    @wraps(plain)
    def timed(*arguments: Any, **keywords: Any) -> Any:
        begin = time.perf_counter()
        try:
            return plain(*arguments, **keywords)
        finally:
            seconds[label] += time.perf_counter() - begin

    return timed
