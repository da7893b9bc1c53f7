"""One process of `grouped.py`: builds its cases, checks and compiles them, and times one when told.

The first line of its input is a JSON list of cases. It answers `{"failed": {index: reason}}`, then
one line of numbers for every index that it reads.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch

import spattention as spa
from spattention.benchmarking.attend import Attend, Tensors, longest_document, tokens_first
from spattention.benchmarking.competitors import (
    Flash4,
    FlashSparse,
    bands,
    dense,
    dense_packed,
    package_versions,
)
from spattention.benchmarking.flex import Flex
from spattention.benchmarking.results import environment
from spattention.benchmarking.timing import graph_milliseconds

from .grouped import DENSE, HEADS, KEY_HEADS, Case
from .token_file import document_lengths

REST = 0.1  # seconds before a measurement
DOCUMENTS = 16  # of a packed row
PREFIX = 4
ROWS = 64  # query rows that are compared with float64
# Of the norm, in half precision. Sums over all rows cancel in the gradients of sinks.
ERRORS = {"out": 0.02, "d_query": 0.02, "d_key": 0.02, "d_value": 0.02, "d_sinks": 0.05}
COMPETITORS = {each.name: each for each in (Flex, FlashSparse, Flash4)}


@dataclass(frozen=True)
class Task:
    """What a case computes.

    Args:
        inputs: query `[B, H, N, D]`, key and value `[B, Hkv, N, D]`, gradient of the output.
        pattern: its mask.
        sinks: `[H]` or None.
        offsets: of packed documents, int32 `[documents + 1]`, or None.
    """

    inputs: Tensors
    pattern: spa.BandPattern
    sinks: torch.Tensor | None = None
    offsets: torch.Tensor | None = None


def pattern_of(case: Case) -> spa.BandPattern:
    """Geometric bands with a local window."""
    if case.by in DENSE:
        return spa.BandPattern.dense(HEADS, case.batch * case.length)
    return spa.BandPattern.shared_local(
        HEADS,
        case.length,
        widths="geometric",
        kv_heads=KEY_HEADS if case.bands == "key/value head" else None,
        prefix=PREFIX if case.variant == "prefix" else 0,
    )


def offsets_of(tokens: int, device: torch.device) -> torch.Tensor:
    """First tokens of documents with log-normal lengths that fill a row, and the row's length."""
    lengths = document_lengths(tokens // DOCUMENTS, DOCUMENTS, tokens)
    lengths[lengths.index(max(lengths))] += tokens - sum(lengths)
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def task_of(case: Case, device: torch.device) -> Task:
    """The inputs of a case, the same in every process."""
    generator = torch.Generator(device).manual_seed(0)
    packed = case.variant == "packed"
    batch = 1 if packed else case.batch
    tokens = case.batch * case.length if packed else case.length

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    query, key, value, d_out = (
        tensor(batch, heads, tokens, case.head_dim)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    )
    sinks = tensor(HEADS).requires_grad_() if case.variant == "sinks" else None
    inputs = (query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), d_out)
    return Task(inputs, pattern_of(case), sinks, offsets_of(tokens, device) if packed else None)


def sampled_rows(task: Task) -> torch.Tensor:
    """Query rows to check: the first and last, the edges of documents, and random ones."""
    length = task.inputs[0].shape[2]
    generator = torch.Generator().manual_seed(1)
    chosen = set(torch.randint(length, (ROWS,), generator=generator).tolist()) | {0, length - 1}
    if task.offsets is not None:
        edges = task.offsets[1:-1].tolist()
        chosen |= {row for edge in edges for row in (edge - 1, edge)}
    return torch.tensor(sorted(chosen), device=task.inputs[0].device)


def exact(task: Task, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients in float64 where only `rows` have a gradient of the output."""
    query, key, value, d_out = task.inputs
    length = query.shape[2]
    group = query.shape[1] // key.shape[1]
    distance = rows[:, None] - torch.arange(length, device=rows.device)
    first = torch.zeros_like(rows)
    if task.offsets is not None:
        document = torch.searchsorted(task.offsets[1:].contiguous(), rows, right=True)
        first = task.offsets[document].long()
    depth = rows - first
    found: dict[str, Any] = {"out": [], "d_query": [], "d_key": [], "d_value": []}
    d_sinks = torch.zeros(query.shape[1], dtype=torch.float64, device=rows.device)
    for entry in range(query.shape[0]):
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in found}
        for head in range(key.shape[1]):
            heads = slice(head * group, head * group + group)
            q = query[entry, heads][:, rows].detach().double().requires_grad_()
            k, v = (t[entry, head].detach().double().requires_grad_() for t in (key, value))
            seen = torch.stack(
                [in_bands(bands, distance) for bands in task.pattern.intervals[heads]]
            )
            seen |= (distance >= 0) & (depth[:, None] - distance < task.pattern.prefix)
            seen &= distance <= depth[:, None]
            scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
            leaves = [q, k, v]
            lse = torch.logsumexp(scores, dim=-1)
            if task.sinks is not None:
                sinks = task.sinks.detach()[heads].double().requires_grad_()
                leaves.append(sinks)
                lse = torch.logaddexp(lse, sinks[:, None])
            out = torch.exp(scores - lse[..., None]) @ v
            grads = torch.autograd.grad(out, leaves, d_out[entry, heads][:, rows].double())
            for name, part in zip(parts, (out.detach(), *grads)):
                parts[name].append(part)
            if task.sinks is not None:
                d_sinks[heads] += grads[3]
        found["out"].append(torch.cat(parts["out"]))
        found["d_query"].append(torch.cat(parts["d_query"]))
        found["d_key"].append(torch.stack(parts["d_key"]))
        found["d_value"].append(torch.stack(parts["d_value"]))
    results = {name: torch.stack(each) for name, each in found.items()}
    return results if task.sinks is None else results | {"d_sinks": d_sinks}


def in_bands(bands: tuple[tuple[int, int], ...], distance: torch.Tensor) -> torch.Tensor:
    seen = torch.zeros_like(distance, dtype=torch.bool)
    for near, far in bands:
        seen |= (distance >= near) & (distance < far)
    return seen


def check(attend: Attend, task: Task) -> dict[str, float]:
    """Relative errors of output and gradients; RuntimeError if one is too large."""
    rows = sampled_rows(task)
    expected = exact(task, rows)
    d_out = torch.zeros_like(task.inputs[3])
    d_out[:, :, rows] = task.inputs[3][:, :, rows]
    out = attend()
    if attend.tokens_first:
        d_out = d_out.transpose(1, 2).contiguous()
    grads = attend.gradients(out, d_out)
    results = [out.detach(), *grads[:3]]
    if attend.tokens_first:
        results = [result.transpose(1, 2) for result in results]
    found = dict(zip(expected, [*(result[:, :, rows] for result in results[:2]), *results[2:]]))
    if len(grads) == 4:
        found["d_sinks"] = grads[3]
    errors = {}
    for name, truth in expected.items():
        errors[name] = ((found[name].double() - truth).norm() / truth.norm()).item()
        if not errors[name] < ERRORS[name]:
            raise RuntimeError(f"{name} is off by {errors[name]:.4f} of its norm")
    return {name: round(error, 5) for name, error in errors.items()}


@dataclass
class Bench:
    """The cases of this process.

    Args:
        cases: to prepare and to time.
        device: of all tensors.
    """

    cases: list[Case]
    device: torch.device
    competitors: dict[Any, tuple[Task, Any]] = field(default_factory=dict)
    calls: dict[int, Attend] = field(default_factory=dict)
    errors: dict[int, dict[str, float]] = field(default_factory=dict)

    def prepare(self) -> dict[int, str]:
        """Build, compile and check every case; the reasons of those that fail."""
        failed = {}
        for index, case in enumerate(self.cases):
            # Competitors are optional packages that raise whatever they like.
            try:
                attend, task = self.call(case)
                self.errors[index] = check(attend, task)
                with torch.no_grad():
                    attend()  # may compile once more without gradients
                self.calls[index] = attend
            except Exception as error:
                lines = str(error).strip().splitlines() or ["no reason given"]
                failed[index] = f"{type(error).__name__}: {lines[0][:300]}"
        return failed

    def call(self, case: Case) -> tuple[Attend, Task]:
        """The call of a case, and what it computes."""
        # Flex compiles for the inputs of one object, so that patterns share what is compiled.
        shape = (case.batch, case.length, case.head_dim, case.variant)
        if shape not in self.competitors:
            task = task_of(case, self.device)
            make = COMPETITORS.get(case.by)
            self.competitors[shape] = (task, None if make is None else make(task.inputs))
        task, competitor = self.competitors[shape]
        pattern = pattern_of(case)
        task = Task(task.inputs, pattern, task.sinks, task.offsets)
        if case.by == "spattention":
            return bands(task.inputs, pattern, task.sinks, task.offsets), task
        if case.by in DENSE:
            if task.offsets is not None:
                return dense_packed(task.inputs, task.offsets), task
            return dense(task.inputs)[case.by.removeprefix("dense, ").removesuffix("-2")], task
        return competitor.on(pattern, task.sinks, task.offsets), task

    def time(self, index: int) -> dict[str, Any]:
        """Milliseconds forward and in total, and useful TFLOP/s."""
        case, attend = self.cases[index], self.calls[index]
        shape = (case.batch, case.length, case.head_dim, case.variant)
        task = self.competitors[shape][0]

        def forward() -> None:
            with torch.no_grad():
                attend()

        def total() -> None:
            attend.backward(attend())

        times = [graph_milliseconds(call, rest=REST) for call in (forward, total)]
        torch.cuda.empty_cache()
        pattern = pattern_of(case)
        lengths = [case.length] * case.batch
        if task.offsets is not None:
            lengths = (task.offsets[1:] - task.offsets[:-1]).tolist()
        work = 14 * case.head_dim * sum(sum(pattern.pairs(length)) for length in lengths)
        found = {
            "forward": round(times[0], 4),
            "total": round(times[1], 4),
            "useful": round(work / times[1] / 1e9, 1),
            "errors": self.errors[index],
        }
        if case.by == "spattention":
            found["kernels"] = kernels(Task(task.inputs, pattern, task.sinks, task.offsets))
        return found


def kernels(task: Task) -> str:
    """Name of the kernels that this library runs for a task."""
    query, key, value = task.inputs[:3]
    if task.offsets is None:
        return spa.explain(query, key, value, task.pattern, sinks=task.sinks, impl="triton").kernels
    query, key, value, _ = (tensor[0] for tensor in tokens_first(task.inputs))
    longest = longest_document(task.offsets)
    return spa.explain(
        query,
        key,
        value,
        task.pattern,
        cu_seqlens_q=task.offsets,
        cu_seqlens_k=task.offsets,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        impl="triton",
    ).kernels


def attempt(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Numbers of a call, or the reason why there are none."""
    try:
        return call()
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no reason given"]
        return {"failed": f"{type(error).__name__}: {lines[0][:300]}"}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print is no answer
    cases = [Case(**case) for case in json.loads(sys.stdin.readline())]
    bench = Bench(cases, torch.device("cuda"))
    print(json.dumps({"failed": bench.prepare()}), file=answers, flush=True)
    torch.cuda.empty_cache()
    facts = {**environment(), **package_versions(), "date": datetime.now(UTC).date().isoformat()}
    for line in sys.stdin:
        index = json.loads(line)
        found = attempt(lambda: bench.time(index))  # noqa: B023
        print(json.dumps({**found, "environment": facts}), file=answers, flush=True)


if __name__ == "__main__":
    main()
