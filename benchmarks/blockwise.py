"""The blockwise implementation on the CPU against PyTorch's dense attention, in one run.

    python -m benchmarks.blockwise --output benchmarks/results/blockwise_cpu_DATE.json

Batch 1, 8 heads, head_dim 64, float32, forward and backward, medians. Every case is checked against
the reference (its own mask, float64) at 512 tokens before it is timed. The cases take turns, so
that a slow spell of the machine meets them all; the least time of a case is the one that others on
the machine disturbed least. Give it the machine alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from spattention import BandPattern, band_attention
from spattention.benchmarking.results import write_rows
from spattention.testing import Case, check_case

HEADS, HEAD_DIM, WINDOW = 8, 64, 512
LENGTHS = (2048, 4096, 8192, 16384)
DENSE_LENGTHS = (2048, 4096, 8192)
DENSE = "dense (SDPA)"
PATTERNS: dict[str, Callable[[int], BandPattern]] = {
    "exclusive": lambda n: BandPattern.exclusive(HEADS, n),
    "shared_local": lambda n: BandPattern.shared_local(HEADS, n),
    "shared_local geometric": lambda n: BandPattern.shared_local(HEADS, n, widths="geometric"),
    f"sliding_window {WINDOW}": lambda n: BandPattern.sliding_window(HEADS, n, min(n, WINDOW)),
}


@dataclass
class Timed:
    """One case, and the seconds that its calls took."""

    name: str
    length: int
    call: Callable[[], None]
    pairs: int
    seconds: list[float] = field(default_factory=list)

    def turn(self) -> None:
        """One call, or as many short ones as a tenth of a second holds."""
        end = time.perf_counter() + 0.1
        while (start := time.perf_counter()) < end:
            self.call()
            self.seconds.append(time.perf_counter() - start)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def cases(length: int) -> list[Timed]:
    shape = (1, HEADS, length, HEAD_DIM)
    tensors = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    d_out = torch.randn(shape)

    def step(attention: Callable[..., Any], **options: object) -> None:
        for tensor in tensors:
            tensor.grad = None
        attention(*tensors, **options).backward(d_out)

    found = []
    if length in DENSE_LENGTHS:
        pairs = sum(BandPattern.dense(HEADS, length).pairs(length))
        found.append(Timed(DENSE, length, partial(step, dense), pairs))
    for name, make in PATTERNS.items():
        pattern = make(length)
        call = partial(step, band_attention, pattern=pattern, impl="blockwise")
        found.append(Timed(name, length, call, sum(pattern.pairs(length))))
    return found


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def check(pattern: BandPattern) -> None:
    query, key, value = (torch.randn(1, HEADS, 512, HEAD_DIM) for _ in range(3))
    check_case(Case(query, key, value, pattern), impl="blockwise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    for make in PATTERNS.values():
        check(make(512))

    timed = [case for length in LENGTHS for case in cases(length)]
    for case in timed:
        case.call()
    for _ in track(range(options.repeats), description="rounds"):
        for case in timed:
            case.turn()

    dense_seconds = {case.length: case.median for case in timed if case.name == DENSE}
    rows: list[dict[str, Any]] = [
        {
            "attention": case.name,
            "length": case.length,
            "seconds": case.median,
            "least_seconds": min(case.seconds),
            "calls": len(case.seconds),
            "nanoseconds_per_pair": case.median / case.pairs * 1e9,
            "least_nanoseconds_per_pair": min(case.seconds) / case.pairs * 1e9,
            "times_faster_than_dense": (
                dense_seconds[case.length] / case.median if case.length in DENSE_LENGTHS else None
            ),
        }
        for case in timed
    ]

    table = Table("attention", "length", "ms", "ns per pair", "least ns per pair", "x dense")
    for row in rows:
        table.add_row(
            row["attention"],
            str(row["length"]),
            f"{row['seconds'] * 1e3:.1f}",
            f"{row['nanoseconds_per_pair']:.2f}",
            f"{row['least_nanoseconds_per_pair']:.2f}",
            f"{row['times_faster_than_dense']:.2f}" if row["times_faster_than_dense"] else "",
        )
    Console().print(table)
    settings = {"heads": HEADS, "head_dim": HEAD_DIM, "repeats": options.repeats}
    write_rows(options.output, "blockwise on the CPU, forward + backward, float32", settings, rows)


if __name__ == "__main__":
    main()
