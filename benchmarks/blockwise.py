"""The blockwise implementation on the CPU against PyTorch's dense attention, in one run.

    python benchmarks/blockwise.py --output benchmarks/results/blockwise_cpu_DATE.json

Batch 1, 8 heads, head_dim 64, float32, forward and backward, medians. Every case is checked against
the reference (its own mask, float64) at 512 tokens before it is timed. The longest come first, so
that the allocator holds what it was given and no length pays for fresh pages. Give it the machine
alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from record import write
from spattention import BandPattern, band_attention
from spattention.testing import Case, check_case

HEADS, HEAD_DIM, WINDOW = 8, 64, 512
LENGTHS = (2048, 4096, 8192, 16384)
DENSE_LENGTHS = (2048, 4096, 8192)
PATTERNS: dict[str, Callable[[int], BandPattern]] = {
    "exclusive": lambda n: BandPattern.exclusive(HEADS, n),
    "shared_local": lambda n: BandPattern.shared_local(HEADS, n),
    "shared_local geometric": lambda n: BandPattern.shared_local(HEADS, n, widths="geometric"),
    f"sliding_window {WINDOW}": lambda n: BandPattern.sliding_window(HEADS, n, min(n, WINDOW)),
}


def step(attention: Callable[..., torch.Tensor], length: int) -> Callable[[], None]:
    shape = (1, HEADS, length, HEAD_DIM)
    tensors = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    d_out = torch.randn(shape)

    def call() -> None:
        for tensor in tensors:
            tensor.grad = None
        attention(*tensors).backward(d_out)

    return call


def median_seconds(call: Callable[[], None], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def check(pattern: BandPattern) -> None:
    tensors = [torch.randn(1, HEADS, 512, HEAD_DIM) for _ in range(3)]
    check_case(Case(*tensors, pattern), impl="blockwise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    for make in PATTERNS.values():
        check(make(512))

    rows = []
    for length in track(LENGTHS[::-1], description="lengths"):
        dense_seconds = None
        if length in DENSE_LENGTHS:
            dense_seconds = median_seconds(step(dense, length), options.repeats)
            rows.append({"attention": "dense (SDPA)", "length": length, "seconds": dense_seconds})
        for name, make in PATTERNS.items():
            pattern = make(length)

            def attention(q, k, v, pattern=pattern):  # type: ignore[no-untyped-def]
                return band_attention(q, k, v, pattern, impl="blockwise")

            seconds = median_seconds(step(attention, length), options.repeats)
            rows.append(
                {
                    "attention": name,
                    "length": length,
                    "seconds": seconds,
                    "nanoseconds_per_pair": seconds / sum(pattern.pairs(length)) * 1e9,
                    "times_faster_than_dense": dense_seconds and dense_seconds / seconds,
                }
            )

    rows.sort(key=lambda row: row["length"])
    table = Table("attention", "length", "ms", "ns per pair", "x dense")
    for row in rows:
        table.add_row(
            row["attention"],
            str(row["length"]),
            f"{row['seconds'] * 1e3:.1f}",
            f"{row['nanoseconds_per_pair']:.2f}" if "nanoseconds_per_pair" in row else "",
            f"{row['times_faster_than_dense']:.2f}" if row.get("times_faster_than_dense") else "",
        )
    Console().print(table)
    settings = {"heads": HEADS, "head_dim": HEAD_DIM, "repeats": options.repeats}
    write(options.output, "blockwise on the CPU, forward + backward, float32", settings, rows)


if __name__ == "__main__":
    main()
