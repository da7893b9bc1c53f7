"""Time the backward pass of seven products per tile, and those of five, on one GPU.

Gradients come first: those of five products are compared with those of seven, and in turn they must
have the same bits twice. Times are medians of graph replays after a rest.

    python -m benchmarks.fused_backward --output benchmarks/results/fused_backward.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

import spattention as spa
from spattention import attention
from spattention.benchmarking.results import write_rows
from spattention.benchmarking.timing import graph_milliseconds
from spattention.impl.triton import hopper

from .prefix import Shape, inputs, patterns

SHAPES = (
    Shape(1, 16, 16, 65536, 128),
    Shape(1, 16, 16, 16384, 128),
    Shape(1, 32, 8, 65536, 64),
    Shape(1, 32, 8, 16384, 64),
)
# Five products or not, and deterministic or not.
SIDES = {
    "seven products": (False, True),
    "five products in turn": (True, True),
    "five products in any order": (True, False),
}
REST = 0.25  # seconds before a measurement: a power limit looks back over a tenth or two
TOLERANCE = 0.02  # of the largest gradient


@contextmanager
def backward_of(fused: bool) -> Iterator[None]:
    """Every plan with five products, or every plan with seven; no call runs as an earlier one."""
    rule = hopper.plan

    def plan(*given: Any) -> hopper.HopperPlan | None:
        found = rule(*given)
        return None if found is None else replace(found, fused_backward=fused)

    with (
        mock.patch.object(hopper, "plan", plan),
        mock.patch.object(attention, "form_of", return_value=None),
    ):
        yield


def measure(shape: Shape, name: str) -> dict[str, Any]:
    """The row of a case: milliseconds of the forward pass, and of both passes by each side."""
    query, key, value, d_out = inputs(shape, shape.tokens)
    pattern = patterns(shape, shape.tokens, 0)[name]
    row: dict[str, Any] = {"shape": str(shape), "pattern": name}
    expected = None

    def forward() -> None:
        with torch.no_grad():
            spa.band_attention(query, key, value, pattern, impl="triton")

    row["forward"] = graph_milliseconds(forward, rest=REST)

    for side, (fused, deterministic) in SIDES.items():
        options = {"impl": "triton", "deterministic": deterministic}

        def total(options: dict[str, Any] = options) -> tuple[torch.Tensor, ...]:
            out = spa.band_attention(query, key, value, pattern, **options)
            return torch.autograd.grad(out, (query, key, value), d_out)

        with backward_of(fused):
            found = total()
            expected = expected or found
            for gradient, other, again in zip(found, expected, total()):
                limit = TOLERANCE * float(other.abs().max())
                torch.testing.assert_close(gradient, other, rtol=0, atol=limit)
                if deterministic and not torch.equal(gradient, again):
                    raise AssertionError(f"{side} gave other bits for {row}")
            row[side] = graph_milliseconds(total, rest=REST)
    useful = 10 * shape.head_dim * shape.batch * sum(pattern.pairs(shape.tokens))
    for side in SIDES:
        row[f"{side}, useful TFLOP/s backward"] = useful / (row[side] - row["forward"]) / 1e9
    return row


def main() -> int:
    """Measure all cases and write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first shapes")
    parser.add_argument("--commit", help="where git cannot tell")
    parser.add_argument("--output", type=Path, required=True, help="file of the rows, JSON")
    options = parser.parse_args()
    environment = {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__}
    settings = {"dtype": "bfloat16", "rest": REST}
    rows = []
    for shape in SHAPES[: options.shapes]:
        for name in patterns(shape, shape.tokens, 0):
            rows.append(measure(shape, name))
            print(rows[-1], flush=True)
            write_rows(
                options.output,
                "forward and backward pass, five products per tile and seven",
                settings,
                rows,
                commit=options.commit,
                environment=environment,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
