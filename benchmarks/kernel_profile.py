"""Time the kernels of a training step's attention one by one, by PyTorch's profiler.

Cases are packed documents (those of `packed.py`) by offsets and by first keys of a row, the same
documents unpacked in batches by length class, and patterns with and without a prefix. A table of
replayed graphs says how long a call takes; this says which kernel takes it.

    python -m benchmarks.kernel_profile --cases packed rows unpacked prefix --output kernels.json
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import spattention as spa
from spattention.benchmarking.attend import Inputs
from spattention.benchmarking.results import environment, write_rows
from spattention.benchmarking.timing import needs_gpu

from .packed import (
    HEAD_DIM,
    HEADS,
    attend_packed,
    attend_rows,
    document_lengths,
    patterns,
    tensors,
)

REPEATS = 4
CASES = ("packed", "rows", "unpacked", "prefix")
DOCUMENTS = ((1024, 64, 4096), (4096, 16, 16384))  # mean length, number, span
PREFIX_SHAPES = ((4, 4096), (1, 16384), (1, 65536))  # batch entries, tokens
Row = dict[str, Any]


def kernel_times(attend: Callable[[], torch.Tensor], inputs: Inputs) -> list[Row]:
    """Name and median microseconds of every kernel of a forward and a backward pass, in order."""

    def call() -> None:
        torch.autograd.grad(attend(), inputs[:3], inputs[3])

    for _ in range(2):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
        for _ in range(REPEATS):
            call()
        torch.cuda.synchronize()
    events = [each for each in found.events() if each.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda each: each.time_range.start)
    count = len(events) // REPEATS
    return [
        {
            "kernel": events[index].name.split("<")[0],
            "microseconds": statistics.median(
                each.time_range.elapsed_us() for each in events[index::count]
            ),
        }
        for index in range(count)
    ]


def over_documents(which: str, names: list[str] | None) -> Iterator[tuple[Row, list[Row]]]:
    """Facts and kernels of the documents as `CASES` says."""
    for mean, number, span in DOCUMENTS:
        lengths = document_lengths(mean, number)
        lengths[-1] += -sum(lengths) % 64  # rows by first keys need a multiple of 64
        offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
        longest, total = max(lengths), sum(lengths)
        for name, pattern in patterns(span).items():
            if names and name not in names:
                continue
            facts = {"case": which, "documents": number, "mean": mean, "pattern": name}
            if which == "unpacked":
                yield facts, unpacked(pattern, lengths)
                continue
            inputs = tensors(total, HEADS) if which == "packed" else tensors(total, HEADS, 1)
            starts = torch.repeat_interleave(offsets[:-1], offsets.diff())[None].contiguous()
            attend = partial(attend_packed, inputs, pattern, offsets, longest)
            if which == "rows":
                attend = partial(attend_rows, inputs, pattern, starts)
            yield facts, kernel_times(attend, inputs)


def unpacked(pattern: spa.BandPattern, lengths: list[int]) -> list[Row]:
    """Kernels of all length classes, those of a name and a place in the call together."""
    classes: dict[int, list[int]] = {}
    for length in lengths:
        classes.setdefault(length.bit_length(), []).append(length)
    sums: dict[tuple[str, int], float] = {}
    for members in classes.values():
        inputs = tensors(round(sum(members) / len(members)), HEADS, len(members))
        seen: dict[str, int] = {}
        for row in kernel_times(partial(attend_rows, inputs, pattern), inputs):
            place = seen[row["kernel"]] = seen.get(row["kernel"], 0) + 1
            key = row["kernel"], place
            sums[key] = sums.get(key, 0.0) + row["microseconds"]
    return [{"kernel": name, "microseconds": total} for (name, _), total in sums.items()]


def with_prefix(names: list[str] | None) -> Iterator[tuple[Row, list[Row]]]:
    """Facts and kernels without a prefix and with one of four keys."""
    for batch, tokens in PREFIX_SHAPES:
        inputs = tensors(tokens, HEADS, batch)
        for name, pattern in patterns(tokens).items():
            if names and name not in names:
                continue
            for prefix in (0, 4):
                found = spa.BandPattern(pattern.intervals, pattern.span, prefix=prefix)
                facts = {"case": "prefix", "batch": batch, "tokens": tokens, "pattern": name}
                attend = partial(attend_rows, inputs, found)
                yield facts | {"prefix": prefix}, kernel_times(attend, inputs)


def main() -> None:
    """Time, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--patterns", nargs="+", help="names of patterns, all by default")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--commit", help="to record where git cannot tell")
    options = parser.parse_args()
    needs_gpu("benchmarks.kernel_profile")
    rows: list[Row] = []
    for case in options.cases:
        found = with_prefix(options.patterns)
        if case != "prefix":
            found = over_documents(case, options.patterns)
        for facts, kernels in found:
            total = sum(each["microseconds"] for each in kernels)
            rows.append(facts | {"microseconds": total, "kernels": kernels})
            parts = " ".join(f"{each['kernel']} {each['microseconds']:.0f}" for each in kernels)
            print(*facts.values(), f"{total:.0f} us:", parts, flush=True)
            if options.output is not None:
                write_rows(
                    options.output,
                    "microseconds of each kernel of attention, forward and backward",
                    {"heads": HEADS, "head_dim": HEAD_DIM},
                    rows,
                    commit=options.commit,
                    environment=environment(),
                )


if __name__ == "__main__":
    main()
