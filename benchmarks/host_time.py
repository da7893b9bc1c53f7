"""Time how long a call keeps the host busy, in turns with `scaled_dot_product_attention`.

Times are medians of 1,000 calls, bands and dense attention in turns. The host waits for the GPU
every few calls, so that a full queue of launches never blocks it. With `--side`, every turn runs
each source tree once, in a process of its own, and results are medians over the turns.

    python -m benchmarks.host_time --output benchmarks/results/host_time.json
    python -m benchmarks.host_time --side old=old/src --side new=src --turns 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch.nn.functional import scaled_dot_product_attention

import spattention as spa

SHAPES = ((1, 8, 4096), (16, 8, 1024))
HEAD_DIM = 128
CALLS = 1000
WARM_UP = 40
CALLS_IN_FLIGHT = 10
TIMES = ("forward", "forward, no gradient", "backward")
# Host time of bands over that of dense attention, at most.
LIMITS = {"forward": 2.5, "forward, no gradient": 2.5, "backward": 1.25}
ROOT = Path(__file__).resolve().parent.parent


def measure(shape: tuple[int, int, int], calls: int) -> list[dict[str, Any]]:
    """Rows of a shape: median microseconds of bands and of dense attention, and their ratio."""
    generator = torch.Generator("cuda").manual_seed(0)
    batch, heads, length = shape
    tensors = [
        torch.randn(
            (batch, heads, length, HEAD_DIM),
            device="cuda",
            dtype=torch.bfloat16,
            generator=generator,
        ).requires_grad_(index < 3)
        for index in range(4)
    ]
    query, key, value, _ = tensors
    pattern = spa.BandPattern.shared_local(heads, length)
    attend: dict[str, Callable[[], Any]] = {
        "bands": lambda: spa.band_attention(query, key, value, pattern, impl="triton"),
        "dense": lambda: scaled_dot_product_attention(query, key, value, is_causal=True),
    }
    samples: dict[tuple[str, str], list[float]] = {}
    for index in range(calls + WARM_UP):
        if index % CALLS_IN_FLIGHT == 0:
            torch.cuda.synchronize()
        for name, call in attend.items():
            found = one_call(call, tensors)
            if index >= WARM_UP:
                for what, seconds in zip(TIMES, found):
                    samples.setdefault((name, what), []).append(seconds)
    rows = []
    for what in TIMES:
        bands, dense = (statistics.median(samples[name, what]) * 1e6 for name in ("bands", "dense"))
        rows.append(
            {
                "B, H, N": list(shape),
                "what": what,
                "bands_us": round(bands, 1),
                "dense_us": round(dense, 1),
                "ratio": round(bands / dense, 3),
            }
        )
    return rows


def one_call(call: Callable[[], Any], tensors: list[torch.Tensor]) -> tuple[float, float, float]:
    """Seconds of the host in `TIMES`."""
    query, key, value, d_out = tensors
    first = time.perf_counter()
    out = call()
    second = time.perf_counter()
    torch.autograd.grad(out, (query, key, value), d_out)
    third = time.perf_counter()
    with torch.no_grad():
        fourth = time.perf_counter()
        call()
        last = time.perf_counter()
    return second - first, last - fourth, third - second


def machine() -> dict[str, str]:
    """GPU and version of Triton."""
    return {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__}


def run_side(path: str, calls: int) -> dict[str, Any]:
    """Rows of one process with this PYTHONPATH; raises RuntimeError where it fails or imports
    another tree.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((path, str(ROOT)))}
    command = [sys.executable, "-m", "benchmarks.host_time", "--worker", "--calls", str(calls)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd="/"
    )
    if done.returncode:
        raise RuntimeError(f"the process with PYTHONPATH={path} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    first = Path(path.split(os.pathsep)[0]).resolve()
    if not Path(found["source"]).is_relative_to(first):
        raise RuntimeError(f"PYTHONPATH={path} imported spattention from {found['source']}")
    return found


def joined(turns: dict[str, list[list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """Medians over the turns of every side."""
    rows = []
    for side, runs in turns.items():
        for same in zip(*runs):
            row = {"side": side, **same[0]}
            for name in ("bands_us", "dense_us", "ratio"):
                row[name] = round(statistics.median(each[name] for each in same), 3)
            rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows, and the limit of each ratio."""
    for row in rows:
        shape = " x ".join(map(str, row["B, H, N"]))
        print(
            f"{row.get('side', ''):10} {shape:14} {row['what']:22} bands {row['bands_us']:7.1f} us "
            f"  dense {row['dense_us']:7.1f} us   ratio {row['ratio']:5.2f}, "
            f"limit {LIMITS[row['what']]}",
            flush=True,
        )


def main() -> int:
    """Measure; write results after every turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", action="append", default=[], metavar="NAME=PYTHONPATH")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--commit", help="to record where git cannot tell")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        rows = [row for shape in SHAPES for row in measure(shape, options.calls)]
        print(json.dumps({"source": str(Path(spa.__file__).resolve().parent), "rows": rows}))
        return 0
    sides = dict(side.partition("=")[::2] for side in options.side)
    if len(sides) < len(options.side) or not all(sides.values()):
        parser.error(f"`--side` must be NAME=PYTHONPATH with different names, got {options.side}")
    if not sides:
        rows = [row for shape in SHAPES for row in measure(shape, options.calls)]
        report(rows, options)
        return 0
    turns: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in sides}
    for turn in range(options.turns):
        order = list(sides)
        shift = turn % len(order)
        for name in order[shift:] + order[:shift]:
            parts = sides[name].split(os.pathsep)
            path = os.pathsep.join(str(Path(part).resolve()) for part in parts)
            turns[name].append(run_side(path, options.calls)["rows"])
        print(f"turn {turn + 1} of {options.turns}")
        report(joined({name: runs for name, runs in turns.items() if runs}), options)
    return 0


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the rows, and write them if there is a file for them."""
    show(rows)
    if options.output is None:
        return
    from spattention.benchmarking.results import write_rows

    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_rows(
        options.output,
        "microseconds that a call keeps the host busy",
        {"calls": options.calls, "turns": options.turns if options.side else 1, "D": HEAD_DIM},
        rows,
        commit=options.commit,
        environment=machine(),
    )


if __name__ == "__main__":
    sys.exit(main())
