"""Time what a compiled launcher could not save of a call's host time.

The host time of an eager call is PyTorch's autograd, memory for results, launches, and the Python
code that finds and makes all of these. A launcher in C++ would replace that code alone: the other
parts, each timed by itself, are its floor. Medians in microseconds, beside whole calls and
`scaled_dot_product_attention` in the same loop.

    python -m benchmarks.host_parts --output benchmarks/results/host_parts.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import spattention as spa
from spattention.benchmarking.results import write_rows
from spattention.compat.triton import BoundLaunch, DirectLaunch

from .host_time import CALLS_IN_FLIGHT, HEAD_DIM, SHAPES, WARM_UP, machine, one_call

Launches = list[tuple[Callable[..., None], tuple[Any, ...]]]


@contextmanager
def launches() -> Iterator[Launches]:
    """The driver's launches of the calls inside, each a function and its arguments."""
    found: Launches = []

    def spying(run: Callable[..., None], name: str) -> Callable[..., None]:
        """`run` of an object that launches by its attribute `name`."""

        def spy(self: Any, *arguments: Any) -> None:
            function = getattr(self, name)

            def launch(*given: Any) -> None:
                found.append((function, given))
                function(*given)

            setattr(self, name, launch)
            try:
                run(self, *arguments)
            finally:
                setattr(self, name, function)

        return spy

    first, later = DirectLaunch.__call__, BoundLaunch.__call__
    with (
        mock.patch.object(DirectLaunch, "__call__", spying(first, "launcher")),
        mock.patch.object(BoundLaunch, "__call__", spying(later, "launch")),
    ):
        yield found


class Empty(torch.autograd.Function):
    """An operator that autograd records as it records the bands', and that does nothing."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, results: Any) -> Any:
        out, lse = results[:2]
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.results = results
        ctx.set_materialize_grads(False)
        return out.view_as(out), lse.view_as(lse)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        assert len(ctx.saved_tensors) == 5
        return *ctx.results[2:], None


def measure(shape: tuple[int, int, int], calls: int) -> dict[str, Any]:
    """Parts of a forward and a backward call of a shape, in microseconds."""
    batch, heads, length = shape
    tensors = [
        torch.randn((batch, heads, length, HEAD_DIM), device="cuda", dtype=torch.bfloat16)
        for _ in range(4)
    ]
    query, key, value = inputs = [each.requires_grad_() for each in tensors[:3]]
    pattern = spa.BandPattern.shared_local(heads, length)

    def bands() -> Any:
        return spa.band_attention(query, key, value, pattern, impl="triton")

    def dense() -> Any:
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, key, value, is_causal=True)

    with torch.no_grad():
        results = [torch.empty_like(query), query.new_empty(shape, dtype=torch.float32)]
        results += [torch.empty_like(each) for each in inputs]
    one_call(bands, tensors)
    with launches() as forward:
        out = bands()
    with launches() as backward:
        torch.autograd.grad(out, inputs, tensors[3])
    samples: dict[str, list[float]] = {}
    for index in range(calls + WARM_UP):
        if index % CALLS_IN_FLIGHT == 0:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for name, call in {
            "bands": bands,
            "dense": dense,
            "autograd": lambda: Empty.apply(query, key, value, results)[0],
        }.items():
            taken = one_call(call, tensors)
            found[f"forward, {name}"], found[f"backward, {name}"] = taken[0], taken[2]
        for name, part in {
            "forward, memory": lambda: [torch.empty_like(each) for each in results[:2]],
            "backward, memory": lambda: [
                torch.empty_like(each) for each in (*results[2:], *results[1:2] * 2)
            ],
            "forward, launches": lambda: _launch(forward),
            "backward, launches": lambda: _launch(backward),
        }.items():
            began = time.perf_counter()
            part()
            found[name] = time.perf_counter() - began
        if index >= WARM_UP:
            for name, seconds in found.items():
                samples.setdefault(name, []).append(seconds)
    row: dict[str, Any] = {"B, H, N": list(shape)}
    row |= {name: round(statistics.median(taken) * 1e6, 1) for name, taken in samples.items()}
    return row | floors(row)


def floors(row: dict[str, Any]) -> dict[str, float]:
    """Sums of the parts that a compiled launcher leaves, and their ratios to dense attention."""
    found = {}
    for way in ("forward", "backward"):
        floor = sum(row[f"{way}, {part}"] for part in ("autograd", "memory", "launches"))
        found[f"{way}, floor"] = round(floor, 1)
        found[f"{way}, floor over dense"] = round(floor / row[f"{way}, dense"], 2)
    return found


def _launch(recorded: Launches) -> None:
    for launcher, given in recorded:
        launcher(*given)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--commit", help="to record where git cannot tell")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    rows = [measure(shape, options.calls) for shape in SHAPES]
    for row in rows:
        print(" ".join(f"{name} {value};" for name, value in row.items()), flush=True)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_rows(
            options.output,
            "microseconds that parts of a call keep the host busy",
            {"calls": options.calls, "D": HEAD_DIM},
            rows,
            commit=options.commit,
            environment=machine(),
        )


if __name__ == "__main__":
    main()
