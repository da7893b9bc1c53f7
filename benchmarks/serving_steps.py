"""Replay the attention of a recorded schedule of vLLM, step by step, in one layer on one GPU.

`serving_schedule.py` records the schedule on a machine without a GPU. Every step runs as the vLLM
back end runs it: paged decoding for requests with one new token, a packed call for the others, a
call of each for every class of heads. The classes decode in turns or side by side, and each way is
a row. Prefill reads blocks in place; it is also timed with its classes side by side, and with keys
that are gathered. Each pattern has its own schedule, because more requests fit where bands free
blocks. Outputs are compared with float64 before anything is timed.

    python -m benchmarks.serving_steps --schedule build/schedule.json.xz --output RESULTS.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

import spattention as spa
from spattention.serving.class_streams import ClassStreams
from spattention.serving.head_classes import select_heads
from spattention.serving.paged import (
    Decodes,
    PagedPrefills,
    Step,
    attend,
    leading_decodes,
    prefills_of,
)
from spattention.testing import Case, check_error, exact, plain

from .serving_memory import class_blocks
from .serving_patterns import HEAD_DIM, KV_HEADS, PATTERNS
from .serving_replay import DTYPE, dense_by_pytorch, per_call, save, step_of

SCALE = HEAD_DIM**-0.5
LAYERS = 32  # of the model whose time to the first token is stated
CHECKED = 64  # queries of a request that are compared with float64
HIDDEN_CYCLES = 8_000_000  # of the GPU, in which the host launches a step
EQUAL_REQUESTS = 8  # of the longest length, for dense attention by cuDNN


@dataclass
class Heads:
    """A class of heads: its bands, a view of the pool, and what its queries and outputs are."""

    pattern: spa.BandPattern
    window: int
    tokens: int
    cache: torch.Tensor
    query: torch.Tensor
    out: torch.Tensor


@dataclass
class Request:
    """A scheduled request: tokens before and in this step, and int32 blocks by class of heads."""

    index: int
    computed: int
    new: int
    blocks: list[np.ndarray]

    @property
    def length(self) -> int:
        return self.computed + self.new


class Layer:
    """One layer's attention over the blocks that a recorded run uses."""

    def __init__(self, name: str, run: dict[str, Any], most_tokens: int) -> None:
        pattern = PATTERNS[name]
        generator = torch.Generator("cuda").manual_seed(0)
        classes = class_blocks(pattern, KV_HEADS)
        wanted = [(one.part.window, one.tokens, len(one.part.kv_heads)) for one in classes]
        groups = [tuple(group[key] for key in ("window", "tokens", "kv_heads"))
                  for group in run["groups"]]  # fmt: skip
        if groups != wanted:
            raise ValueError(f"the schedule's classes of heads are {groups}, not {wanted}")
        _, tokens, kv_heads = wanted[0]
        pool = torch.empty(
            run["blocks"], kv_heads * tokens * 2 * HEAD_DIM, device="cuda", dtype=DTYPE
        )
        for part in pool.split(4096):
            part.normal_(generator=generator)
        self.heads = []
        group = pattern.num_heads // KV_HEADS
        for one, (window, tokens, kv_heads) in zip(classes, wanted):
            heads = [head * group + i for head in one.part.kv_heads for i in range(group)]
            shape = (most_tokens, len(heads), HEAD_DIM)
            query = torch.randn(shape, device="cuda", generator=generator).to(DTYPE)
            cache = pool.view(-1, kv_heads, tokens, 2 * HEAD_DIM)
            bands = select_heads(pattern, heads)
            self.heads.append(Heads(bands, window, tokens, cache, query, torch.empty_like(query)))
        self.streams = ClassStreams(len(self.heads), pool.device)

    def steps(self, requests: list[Request]) -> list[Step]:
        """What the back end knows of a step, for each class; decoding requests come first."""
        offsets = [0]
        for request in requests:
            offsets.append(offsets[-1] + request.new)
        lengths = [request.length for request in requests]
        count = leading_decodes(offsets)
        seq_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        steps = []
        for index in range(len(self.heads)):
            columns = max(len(request.blocks[index]) for request in requests)
            rows = np.zeros((len(requests), columns), dtype=np.int32)
            for row, request in zip(rows, requests):
                row[: len(request.blocks[index])] = request.blocks[index]
            table = torch.from_numpy(rows).to("cuda")
            decodes = Decodes(table[:count], seq_lens[:count]) if count else None
            prefills = None
            if count < len(requests):
                first, last = offsets[count], offsets[-1]
                starts = torch.tensor(offsets[count:], dtype=torch.int32, device="cuda") - first
                rest = table[count:], seq_lens[count:]
                prefills = PagedPrefills(first, last, starts, *rest, max(lengths[count:]))
            steps.append(Step(decodes, prefills))
        return steps

    def gathered(self, requests: list[Request], steps: list[Step]) -> list[Step]:
        """The prefills of a step over copies of their keys, as before blocks were read in place."""
        found = []
        for heads, step in zip(self.heads, steps):
            if isinstance(step.prefills, PagedPrefills):
                rest = requests[len(requests) - len(step.prefills.block_table) :]
                offsets = [step.prefills.first, *(request.new for request in rest)]
                facts = [*accumulate(offsets)], [request.length for request in rest]
                table = step.prefills.block_table
                prefills = prefills_of(*facts, table, heads.tokens, heads.window)
                found.append(Step(None, prefills))
        return found

    def decode(self, steps: list[Step]) -> None:
        """Requests with one new token, one class after the other."""
        for heads, step in zip(self.heads, steps):
            if step.decodes is not None:
                self._attend(heads, Step(step.decodes, None))

    def decode_side_by_side(self, steps: list[Step]) -> None:
        """The same, each class on a stream of its own."""
        if steps[0].decodes is not None:
            self.streams.run(
                [
                    partial(self._attend, heads, Step(step.decodes, None))
                    for heads, step in zip(self.heads, steps)
                ]
            )

    def prefill(self, steps: list[Step]) -> None:
        for heads, step in zip(self.heads, steps):
            if step.prefills is not None:
                self._attend(heads, Step(None, step.prefills))

    def prefill_side_by_side(self, steps: list[Step]) -> None:
        """The same, each class on a stream of its own, the farthest window first."""
        pairs = [*zip(self.heads, steps)][::-1]
        if steps[0].prefills is not None:
            self.streams.run(
                [partial(self._attend, heads, Step(None, step.prefills)) for heads, step in pairs]
            )

    def _attend(self, heads: Heads, step: Step) -> None:
        attend(heads.query, heads.cache, step, heads.pattern, heads.out, scale=SCALE)

    def check(self, requests: list[Request], steps: list[Step]) -> None:
        """Compare the last queries of the first and the last request with float64, in the first
        head of each class."""
        for decode in (self.decode, self.decode_side_by_side):
            for heads in self.heads:
                heads.out.fill_(float("nan"))
            decode(steps)
            self.prefill(steps)
            self._check_outputs(requests)

    def _check_outputs(self, requests: list[Request]) -> None:
        ends = torch.tensor([request.new for request in requests]).cumsum(0).tolist()
        for index, heads in enumerate(self.heads):
            for request, end in ((requests[0], ends[0]), (requests[-1], ends[-1])):
                rows = slice(end - min(request.new, CHECKED), end)
                blocks = heads.cache[torch.from_numpy(request.blocks[index]).to("cuda").long()]
                text = blocks.transpose(0, 1).flatten(1, 2)[:1, : request.length]
                key, value = text[None].split(HEAD_DIM, dim=-1)
                query, out = (
                    each[rows, :1].transpose(0, 1)[None] for each in (heads.query, heads.out)
                )
                case = Case(query, key, value, heads.pattern.heads(0, 1))
                check_error("out", out, plain(case)["out"], exact(case)["out"])


def scheduled(run: dict[str, Any]) -> Iterator[list[Request]]:
    """The requests of each step, decoding ones first, with all their blocks."""
    held: dict[int, list[np.ndarray]] = {}
    for step in run["steps"]:
        requests = []
        for index, computed, new, replaces, given in step:
            blocks = [np.array(each, dtype=np.int32) for each in given]
            if not replaces:
                blocks = [
                    np.concatenate((old, added)) if len(added) else old
                    for old, added in zip(held[index], blocks)
                ]
            held[index] = blocks
            requests.append(Request(index, computed, new, held[index]))
        yield sorted(requests, key=lambda request: request.new != 1)


def milliseconds(calls: list[Callable[[], None]]) -> list[float]:
    """Time of each call on the GPU, the second of two, without the host's time."""
    for call in calls:
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    torch.cuda._sleep(HIDDEN_CYCLES)
    events[0].record()
    for call, event in zip(calls, events[1:]):
        call()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairwise(events)]


@dataclass
class StepTimes:
    """Milliseconds of one step of one layer."""

    decode: float = 0.0
    decode_side_by_side: float = 0.0
    prefill: float = 0.0
    prefill_side_by_side: float = 0.0
    prefill_gathered: float = 0.0


def time_step(layer: Layer, requests: list[Request], steps: list[Step]) -> StepTimes:
    """Time the parts that a step has."""
    calls: dict[str, Callable[[], None]] = {}
    if any(step.decodes is not None for step in steps):
        calls["decode"] = partial(layer.decode, steps)
        if len(steps) > 1:
            calls["decode_side_by_side"] = partial(layer.decode_side_by_side, steps)
    if any(step.prefills is not None for step in steps):
        gathered = layer.gathered(requests, steps)
        calls["prefill"] = partial(layer.prefill, steps)
        calls["prefill_side_by_side"] = partial(layer.prefill_side_by_side, steps)
        calls["prefill_gathered"] = partial(layer.prefill, gathered)
    return StepTimes(**dict(zip(calls, milliseconds([*calls.values()]))))


def replay(name: str, schedule: dict[str, Any], most_tokens: int) -> Iterator[dict[str, Any]]:
    """A row for each way to decode the classes of a pattern, over all steps of its schedule."""
    run, prompts = schedule["runs"][name], schedule["prompts"]
    layer = Layer(name, run, most_tokens)
    checks = {0, len(run["steps"]) // 10, len(run["steps"]) // 2}
    times: list[StepTimes] = []
    starts: dict[int, int] = {}  # the step of each request's first new token
    running: list[int] = []
    for number, requests in enumerate(scheduled(run)):
        steps = layer.steps(requests)
        if number in checks:
            layer.check(requests, steps)
        times.append(time_step(layer, requests, steps))
        for request in requests:
            if request.length == prompts[request.index]:
                starts.setdefault(request.index, number)
        running.append(len(requests))
    ways = {"in turns": "decode", "side by side": "decode_side_by_side"}
    for way, part in ways.items():
        if way == "in turns" or len(layer.heads) > 1:
            decoding = [getattr(each, part) for each in times]
            sums = np.cumsum([a + each.prefill for a, each in zip(decoding, times)]) * LAYERS / 1e3
            waits = sorted(float(sums[number]) for number in starts.values())
            tokens = schedule["new_tokens"] * len(prompts)
            yield {
                "attention": name,
                "order": way,
                "steps": len(running),
                "most_requests": max(running),
                "mean_requests": statistics.mean(running),
                "decode_milliseconds": sum(decoding),
                "prefill_milliseconds": sum(each.prefill for each in times),
                "prefill_side_by_side": sum(each.prefill_side_by_side for each in times),
                "prefill_gathered": sum(each.prefill_gathered for each in times),
                "new_tokens": tokens,
                "new_tokens_per_second": tokens / float(sums[-1]),
                "median_seconds_to_first_token": statistics.median(waits),
                "p90_seconds_to_first_token": waits[int(0.9 * len(waits))],
            }


def cudnn_share() -> float:
    """Time of cuDNN's dense decoding over contiguous keys, as a share of our paged kernel's."""
    rows = dense_by_pytorch(EQUAL_REQUESTS)
    (cudnn,) = (row["microseconds"] for row in rows if "cuDNN" in row["attention"])
    lengths = [PATTERNS["dense"].span] * EQUAL_REQUESTS
    classes = class_blocks(PATTERNS["dense"], KV_HEADS)
    step = step_of(PATTERNS["dense"], lengths, classes)
    return float(cudnn) / per_call([step.in_turns], 3)


def main() -> int:
    """Check, time and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--schedule", type=Path, required=True, help="of `serving_schedule`")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--commit", help="where git cannot tell it")
    options = parser.parse_args()
    content = options.schedule.read_bytes()
    schedule = json.loads(lzma.decompress(content))
    most_tokens = max(sum(new for _, _, new, *_ in step)
                      for run in schedule["runs"].values() for step in run["steps"])  # fmt: skip
    settings = {key: schedule[key] for key in ("vllm", "memory", "new_tokens")}
    settings |= {
        "requests": len(schedule["prompts"]),
        "prompt_tokens": sum(schedule["prompts"]),
        "schedule_sha256": hashlib.sha256(content).hexdigest(),
        "layers": LAYERS,
        "cudnn_share_of_dense_decoding": cudnn_share(),
    }
    rows = []
    for name in options.patterns:
        for row in replay(name, schedule, most_tokens):
            rows.append(row)
            print(row, flush=True)
        torch.cuda.empty_cache()
        what = "attention of a recorded schedule of vLLM in one layer"
        save(options.output, what, settings, rows, options.commit)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
