"""Time patterns with and without a prefix, in turns on one GPU.

Correctness comes first: every shape and pattern is checked against float64 at a shorter length.
Times are medians of graph replays, and medians of those over the turns. Next to each ratio stands
the one that the added blocks of 64 keys would give if every block cost the same.

    python -m benchmarks.prefix --output benchmarks/results/prefix.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

import spattention as spa
from spattention.benchmarking.attend import Inputs
from spattention.benchmarking.results import write_rows
from spattention.testing import Case, check_case

from .kernels_in_turns import calls, replayed

PREFIXES = (0, 4, 64)
BLOCK = 64  # queries and keys
CHECKED = 1300  # tokens of the cases that are checked; more than one chunk of a prefix's queries


@dataclass(frozen=True)
class Shape:
    """Sizes of a case: batch, query heads, key/value heads, tokens, head_dim."""

    batch: int
    heads: int
    key_heads: int
    tokens: int
    head_dim: int

    def __str__(self) -> str:
        group = "" if self.heads == self.key_heads else f"/{self.key_heads}"
        return f"{self.batch} x {self.heads}{group} x {self.tokens}, D {self.head_dim}"


SHAPES = (
    Shape(1, 16, 16, 65536, 128),
    Shape(1, 16, 16, 16384, 128),
    Shape(4, 16, 16, 4096, 128),
    Shape(1, 32, 8, 16384, 64),
)


def patterns(shape: Shape, span: int, prefix: int) -> dict[str, spa.BandPattern]:
    """The patterns of the table of attention's speed."""
    groups = None if shape.heads == shape.key_heads else shape.key_heads
    options: dict[str, Any] = {"kv_heads": groups, "prefix": prefix}
    pattern = spa.BandPattern
    return {
        "exclusive": pattern.exclusive(shape.heads, span, **options),
        "shared_local": pattern.shared_local(shape.heads, span, **options),
        "geometric": pattern.shared_local(shape.heads, span, widths="geometric", **options),
    }


def inputs(shape: Shape, tokens: int) -> Inputs:
    """Query, key, value and the gradient of the output."""
    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(heads: int) -> torch.Tensor:
        size = (shape.batch, heads, tokens, shape.head_dim)
        return torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=generator)

    query = drawn(shape.heads).requires_grad_()
    key, value = (drawn(shape.key_heads).requires_grad_() for _ in range(2))
    return query, key, value, drawn(shape.heads)


def check(shape: Shape) -> None:
    """Compare every pattern of a shape with float64, at `CHECKED` tokens and one batch entry."""
    query, key, value, _ = (each[:1].detach() for each in inputs(shape, CHECKED))
    for prefix in PREFIXES:
        for pattern in patterns(shape, CHECKED, prefix).values():
            check_case(Case(query, key, value, pattern), impl="triton")


def blocks(pattern: spa.BandPattern, tokens: int) -> int:
    """Blocks of keys that the blocks of queries of all heads read for their bands."""
    total = 0
    for head in pattern.intervals:
        for near, far in head:
            for first in range(0, tokens, BLOCK):
                low = max(first - far + 1, pattern.prefix)
                high = min(first + BLOCK, tokens) - near
                total += -(-max(high - low, 0) // BLOCK)
    return total


def added(pattern: spa.BandPattern, without: spa.BandPattern, tokens: int) -> float:
    """Blocks of keys with the prefix over those without it."""
    heads = sum(bool(head) for head in pattern.intervals)
    own = heads * -(-tokens // BLOCK) * -(-pattern.prefix // BLOCK)
    return (blocks(pattern, tokens) + own) / blocks(without, tokens)


def measure(shape: Shape, turns: int) -> list[dict[str, Any]]:
    """Rows of a shape: milliseconds by pattern, prefix and pass."""
    tensors = inputs(shape, shape.tokens)
    by_prefix = {prefix: patterns(shape, shape.tokens, prefix) for prefix in PREFIXES}
    rows = []
    for name, without in by_prefix[0].items():
        samples: dict[tuple[int, str], list[float]] = {}
        for turn in range(turns):
            shift = turn % len(PREFIXES)
            for prefix in PREFIXES[shift:] + PREFIXES[:shift]:
                forward, total = calls(torch, spa, tensors, by_prefix[prefix][name])
                samples.setdefault((prefix, "forward"), []).append(replayed(torch, forward))
                samples.setdefault((prefix, "total"), []).append(replayed(torch, total))
        medians = {key: statistics.median(each) for key, each in samples.items()}
        for prefix in PREFIXES:
            pattern = by_prefix[prefix][name]
            row = {
                "shape": str(shape),
                "pattern": name,
                "prefix": prefix,
                "forward_ms": medians[prefix, "forward"],
                "forward_backward_ms": medians[prefix, "total"],
                "forward_ratio": medians[prefix, "forward"] / medians[0, "forward"],
                "forward_backward_ratio": medians[prefix, "total"] / medians[0, "total"],
                "blocks_ratio": added(pattern, without, shape.tokens),
                "kernels": spa.explain(*tensors[:3], pattern).kernels,
            }
            rows.append(row)
            print(
                f"{row['shape']:28} {name:14} prefix {prefix:3} {row['forward_ms']:9.4f} "
                f"{row['forward_backward_ms']:9.4f} ms   over prefix 0: "
                f"{row['forward_ratio']:.3f} {row['forward_backward_ratio']:.3f}, "
                f"blocks {row['blocks_ratio']:.3f}",
                flush=True,
            )
    return rows


def main() -> int:
    """Check, time and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        check(shape)
        print(f"{shape}: right", flush=True)
        rows += measure(shape, options.turns)
        if options.output is not None:
            write_rows(
                options.output,
                "milliseconds of attention with and without a prefix",
                {"turns": options.turns, "checked_tokens": CHECKED},
                rows,
                environment={"gpu": torch.cuda.get_device_name(), "triton": triton.__version__},
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
