"""Replay the attention of a recorded schedule of vLLM, step by step, in one layer on one GPU.

`serving_schedule.py` records the schedule on a machine without a GPU. Every step runs as the vLLM
back end runs it: paged decoding for requests with one new token, a packed call for the others, a
call of each for every class of heads. Each pattern has its own schedule, because more requests fit
where bands free blocks. Dense attention's gathering of keys is not counted: kernels of others read
the blocks in place. Outputs are compared with float64 before anything is timed.

    python -m benchmarks.serving_steps --schedule build/schedule.json.xz --output RESULTS.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import spattention as spa
from spattention.serving.head_classes import select_heads
from spattention.serving.paged import (
    Decodes,
    Step,
    attend,
    gather,
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
HIDDEN_CYCLES = 5_000_000  # of the GPU, in which the host launches a step
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
    """A scheduled request: tokens before and in this step, and its blocks by class of heads."""

    index: int
    computed: int
    new: int
    blocks: list[list[int]]

    @property
    def length(self) -> int:
        return self.computed + self.new


class Layer:
    """One layer's attention over the blocks that a recorded run uses."""

    def __init__(self, name: str, run: dict[str, Any], most_tokens: int) -> None:
        pattern, self.is_dense = PATTERNS[name], name == "dense"
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

    def steps(self, requests: list[Request]) -> list[Step]:
        """What the back end knows of a step, for each class; decoding requests come first."""
        offsets = [0]
        for request in requests:
            offsets.append(offsets[-1] + request.new)
        lengths = [request.length for request in requests]
        count = leading_decodes(offsets)
        seq_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        steps = []
        for index, heads in enumerate(self.heads):
            rows = [request.blocks[index] for request in requests]
            columns = max(len(row) for row in rows)
            table = torch.tensor([row + [0] * (columns - len(row)) for row in rows])
            table = table.to("cuda", torch.int32)
            decodes = Decodes(table[:count], seq_lens[:count]) if count else None
            rest = offsets[count:], lengths[count:], table[count:]
            steps.append(Step(decodes, prefills_of(*rest, heads.tokens, heads.window)))
        return steps

    def decode(self, steps: list[Step]) -> None:
        for heads, step in zip(self.heads, steps):
            if step.decodes is not None:
                self._attend(heads, Step(step.decodes, None))

    def prefill(self, steps: list[Step]) -> None:
        for heads, step in zip(self.heads, steps):
            if step.prefills is not None:
                self._attend(heads, Step(None, step.prefills))

    def gather(self, steps: list[Step]) -> None:
        """The part of `prefill` that copies keys."""
        for heads, step in zip(self.heads, steps):
            if step.prefills is not None:
                gather(heads.cache, step.prefills)

    def _attend(self, heads: Heads, step: Step) -> None:
        attend(heads.query, heads.cache, step, heads.pattern, heads.out, scale=SCALE)

    def check(self, requests: list[Request], steps: list[Step]) -> None:
        """Compare the last queries of the first and the last request with float64, in the first
        head of each class."""
        self.decode(steps)
        self.prefill(steps)
        ends = torch.tensor([request.new for request in requests]).cumsum(0).tolist()
        for index, heads in enumerate(self.heads):
            for request, end in ((requests[0], ends[0]), (requests[-1], ends[-1])):
                rows = slice(end - min(request.new, CHECKED), end)
                blocks = heads.cache[torch.tensor(request.blocks[index], device="cuda")]
                text = blocks.transpose(0, 1).flatten(1, 2)[:1, : request.length]
                key, value = text[None].split(HEAD_DIM, dim=-1)
                query, out = (
                    each[rows, :1].transpose(0, 1)[None] for each in (heads.query, heads.out)
                )
                case = Case(query, key, value, heads.pattern.heads(0, 1))
                check_error("out", out, plain(case)["out"], exact(case)["out"])


def scheduled(run: dict[str, Any]) -> Iterator[list[Request]]:
    """The requests of each step, decoding ones first, with all their blocks."""
    held: dict[int, list[list[int]]] = {}
    for step in run["steps"]:
        requests = []
        for index, computed, new, replaces, blocks in step:
            old = [[] for _ in blocks] if replaces else held[index]
            held[index] = [before + added for before, added in zip(old, blocks)]
            requests.append(Request(index, computed, new, held[index]))
        yield sorted(requests, key=lambda request: request.new != 1)


def milliseconds(call: Any, *arguments: Any) -> float:
    """Time of a call on the GPU, the second of two, without the host's time."""
    call(*arguments)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HIDDEN_CYCLES)
    begin.record()
    call(*arguments)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def replay(name: str, schedule: dict[str, Any], most_tokens: int) -> dict[str, Any]:
    """The sums over all steps of a pattern's schedule, in milliseconds of one layer."""
    run, prompts = schedule["runs"][name], schedule["prompts"]
    layer = Layer(name, run, most_tokens)
    checks = {0, len(run["steps"]) // 10, len(run["steps"]) // 2}
    now = decoding = prefilling = gathering = 0.0
    first_tokens: dict[int, float] = {}
    running: list[int] = []
    for number, requests in enumerate(scheduled(run)):
        steps = layer.steps(requests)
        if number in checks:
            layer.check(requests, steps)
        if any(step.decodes is not None for step in steps):
            decoding += (time := milliseconds(layer.decode, steps))
            now += time
        if any(step.prefills is not None for step in steps):
            time = milliseconds(layer.prefill, steps)
            copied = milliseconds(layer.gather, steps)
            gathering += copied
            time -= copied if layer.is_dense else 0.0
            prefilling += time
            now += time
        for request in requests:
            if request.length == prompts[request.index] and request.index not in first_tokens:
                first_tokens[request.index] = now
        running.append(len(requests))
    waits = sorted(wait * LAYERS / 1e3 for wait in first_tokens.values())
    tokens = schedule["new_tokens"] * len(prompts)
    return {
        "attention": name,
        "steps": len(running),
        "most_requests": max(running),
        "mean_requests": statistics.mean(running),
        "decode_milliseconds": decoding,
        "prefill_milliseconds": prefilling,
        "gather_milliseconds": gathering,
        "new_tokens": tokens,
        "new_tokens_per_second": tokens / (now * LAYERS / 1e3),
        "median_seconds_to_first_token": statistics.median(waits),
        "p90_seconds_to_first_token": waits[int(0.9 * len(waits))],
    }


def cudnn_share() -> float:
    """Time of cuDNN's dense decoding over contiguous keys, as a share of our paged kernel's."""
    rows = dense_by_pytorch(EQUAL_REQUESTS)
    (cudnn,) = (row["microseconds"] for row in rows if "cuDNN" in row["attention"])
    lengths = [PATTERNS["dense"].span] * EQUAL_REQUESTS
    classes = class_blocks(PATTERNS["dense"], KV_HEADS)
    step, _, _ = step_of(PATTERNS["dense"], lengths, classes)
    return float(cudnn) / per_call([step], 3)


def main() -> int:
    """Check, time and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--schedule", type=Path, required=True, help="of `serving_schedule`")
    parser.add_argument("--output", type=Path)
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
    for name in PATTERNS:
        rows.append(replay(name, schedule, most_tokens))
        print(rows[-1], flush=True)
        torch.cuda.empty_cache()
        what = "attention of a recorded schedule of vLLM in one layer"
        save(options.output, what, settings, rows, options.commit)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
