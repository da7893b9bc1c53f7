"""One process of `processes.py`: checks and compiles its cases, and times one when it is told.

The first line of its input is a JSON list of cases. It answers `{"failed": {index: reason},
"seconds": {index: seconds}}`, then one line of numbers for every index that it reads. Inputs are
made again for each measurement, so that many processes share a GPU.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
from torch._dynamo import config as dynamo

import spattention as spa
from spattention.benchmarking.attend import Attend, Tensors, longest_document, tokens_first
from spattention.benchmarking.competitors import (
    PATTERNS,
    Flash4,
    FlashSparse,
    bands,
    dense,
    dense_packed,
    package_versions,
)
from spattention.benchmarking.flex import Flex, FlexFlash
from spattention.benchmarking.results import environment
from spattention.benchmarking.roofline import work_of
from spattention.benchmarking.timing import (
    copy_speed,
    eager_milliseconds,
    graph_milliseconds,
    matrix_speed,
)
from spattention.binding import bind
from spattention.impl import triton as kernels_of_triton

from ..packed import document_lengths
from .cases import ANY_ORDER, BANDS, DECODE, DENSE, LONG_EAGER, OURS, Case
from .check import Task, check
from .decoding import Decoding

REST = 0.15  # seconds before a measurement: a power limit looks back over a tenth or two
DOCUMENTS = 16  # of a packed row
PREFIX = 4
RECOMPILES = 64  # of one function, beyond which it runs without a compiler
CAPTURES = 2  # attempts: the first may load what no capture may
TRIES, PAUSE = 5, 3.0  # seconds between them, where other processes have the GPU's memory
NO_MEMORY = torch.OutOfMemoryError.__name__
COMPETITORS = {each.name: each for each in (Flex, FlexFlash, FlashSparse, Flash4)}


def pattern_of(case: Case) -> spa.BandPattern:
    """The mask of a case, over the tokens of its row."""
    if case.mask == "dense":
        tokens = case.batch * case.length if case.variant == "packed" else case.length
        return spa.BandPattern.dense(case.heads, tokens)
    if case.mask in PATTERNS:
        return PATTERNS[case.mask](case.heads, case.length)
    return spa.BandPattern.shared_local(
        case.heads,
        case.length,
        widths="geometric",
        kv_heads=case.key_heads if case.mask == BANDS["key/value head"] else None,
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
        for heads in (case.heads, case.key_heads, case.key_heads, case.heads)
    )
    sinks = tensor(case.heads).requires_grad_() if case.variant == "sinks" else None
    inputs = (query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), d_out)
    return Task(inputs, pattern_of(case), sinks, offsets_of(tokens, device) if packed else None)


@dataclass
class Attention:
    """Cases with a forward and a backward pass.

    Args:
        device: of all tensors.
    """

    device: torch.device
    competitors: dict[str, Any] = field(default_factory=dict)
    copy: float | None = None

    def prepare(self, case: Case) -> dict[str, Any]:
        """Compile and check a case; the facts of its row."""
        task = task_of(case, self.device)
        ours = case.by in (OURS, ANY_ORDER)
        facts: dict[str, Any] = {"kernels": kernels(task, case.by != ANY_ORDER)} if ours else {}
        if case.by == ANY_ORDER and facts["kernels"] == kernels(task):
            return facts | {"as": OURS}
        attend = self.call(case, task)
        facts["errors"] = check(attend, task)
        with torch.no_grad():
            attend()  # may compile again without gradients
        return facts

    def call(self, case: Case, task: Task) -> Attend:
        """The call of a case."""
        if case.by in (OURS, ANY_ORDER):
            order = case.by == OURS
            return bands(task.inputs, task.pattern, task.sinks, task.offsets, deterministic=order)
        if case.by in DENSE[:2]:
            if task.offsets is not None:
                return dense_packed(task.inputs, task.offsets)
            return dense(task.inputs)[case.by.removeprefix("dense, ").removesuffix("-2")]
        competitor = self.competitor(case.by.removeprefix("dense, "), task.inputs)
        if case.by in DENSE:
            found: Attend = competitor.dense
            return found
        found = competitor.on(task.pattern, task.sinks, task.offsets)
        return found

    def competitor(self, name: str, inputs: Tensors) -> Any:
        """The competitor on these inputs, with what it has compiled for others."""
        if name in self.competitors:
            self.competitors[name].take(inputs)
        else:
            dynamo.recompile_limit = RECOMPILES
            self.competitors[name] = COMPETITORS[name](inputs)
        return self.competitors[name]

    def release(self) -> None:
        """Forget the inputs, whose memory other processes need."""
        for competitor in self.competitors.values():
            competitor.inputs = ()

    def time(self, case: Case) -> dict[str, Any]:
        """Milliseconds forward and in total, and what limits them."""
        task = task_of(case, self.device)
        attend = self.call(case, task)

        def forward() -> None:
            with torch.no_grad():
                attend()

        def total() -> None:
            attend.backward(attend())

        if (case.batch, case.heads, case.length) == LONG_EAGER:
            times, reason = [eager_milliseconds(call, rest=REST) for call in (forward, total)], None
        else:
            times, reason = milliseconds((forward, total))
        found: dict[str, Any] = {"forward": round(times[0], 4), "total": round(times[1], 4)}
        if reason is not None:
            found["plain_calls"] = reason
        if case.by != OURS:
            return found
        lengths = [case.length] * case.batch
        if task.offsets is not None:
            lengths = (task.offsets[1:] - task.offsets[:-1]).tolist()
        work = work_of(task.pattern, lengths, task.inputs[0], task.inputs[1])
        self.copy = self.copy or copy_speed()
        return found | {
            "work": [asdict(each) for each in work],
            "matrix": [round(matrix_speed(each, rest=REST), 1) for each in times],
            "copy": round(self.copy, 3),
        }


def milliseconds(calls: Sequence[Callable[[], None]]) -> tuple[list[float], str | None]:
    """Times of replays; or of plain calls, which may wait for the host, and why the calls cannot be
    captured: flash-sparse-attn's first capture of packed documents in a process fails.
    """
    reason = None
    for _ in range(CAPTURES):
        try:
            return [graph_milliseconds(call, rest=REST) for call in calls], None
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).strip().splitlines()[0][:300]
            torch.cuda.synchronize()
    return [eager_milliseconds(call, rest=REST) for call in calls], reason


def kernels(task: Task, deterministic: bool = True) -> str:
    """Name of the kernels that this library runs for a task."""
    query, key, value = task.inputs[:3]
    if task.offsets is None:
        options: dict[str, Any] = dict.fromkeys(("scale", "query_start", "key_start"))
        call = bind(query, key, value, task.pattern, sinks=task.sinks, **options)
        return kernels_of_triton.describe(call._replace(deterministic=deterministic))[0]
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


@dataclass
class Bench:
    """The cases of this process.

    Args:
        cases: to prepare and to time.
        device: of all tensors.
    """

    cases: list[Case]
    device: torch.device
    facts: dict[int, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        decodes = all(case.variant == DECODE for case in self.cases)
        self.part = Decoding(self.device) if decodes else Attention(self.device)

    def prepare(self) -> dict[str, Any]:
        """Build, compile and check every case; the reasons of those that fail, and seconds."""
        failed, seconds = {}, {}
        for index, case in enumerate(self.cases):
            began = time.monotonic()
            for _ in range(TRIES):
                found = attempt(partial(self.part.prepare, case))
                self.release()
                if not found.get("failed", "").startswith(NO_MEMORY):
                    break
                time.sleep(PAUSE)
            seconds[index] = round(time.monotonic() - began, 1)
            if "failed" in found:
                failed[index] = found["failed"]
            self.facts[index] = found
        return {"failed": failed, "seconds": seconds}

    def time(self, index: int) -> dict[str, Any]:
        """Numbers of a case."""
        facts = self.facts[index]
        if "as" in facts:
            return facts
        try:
            return self.part.time(self.cases[index]) | facts
        finally:
            self.release()

    def release(self) -> None:
        """Give memory back to other processes."""
        self.part.release()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def attempt(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Numbers of a call, or the reason why there are none: competitors are optional packages that
    raise whatever they like.
    """
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
    print(json.dumps(bench.prepare()), file=answers, flush=True)
    facts = {**environment(), **package_versions(), "date": datetime.now(UTC).date().isoformat()}
    for line in sys.stdin:
        found = attempt(partial(bench.time, json.loads(line)))
        print(json.dumps({**found, "environment": facts}), file=answers, flush=True)


if __name__ == "__main__":
    main()
