"""Attention of new tokens of prompts over a paged cache: blocks read in place, and gathered before.

A step is one layer's attention as the vLLM back end runs it, a call for each class of heads, of one
request or of several. `in place` reads the blocks through the table; `gathered` copies the readable
keys first, and calls the kernels of packed documents. Both are compared with float64, and timed in
turns, medians of graph replays, in microseconds. Classes follow one another, or run `side by side`,
in place.

    python -m benchmarks.serving_prefill --output benchmarks/results/serving_prefill.json
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import spattention as spa
from spattention.impl.triton.hopper import planning
from spattention.serving.class_streams import ClassStreams
from spattention.serving.head_classes import select_heads
from spattention.serving.paged import PagedPrefills, Step, attend, gather, prefills_of
from spattention.testing import Case, check_error, exact, plain

from .serving_memory import LONGEST, class_blocks
from .serving_patterns import HEAD_DIM, KV_HEADS, PATTERNS
from .serving_replay import DTYPE, per_call, save

SCALE = HEAD_DIM**-0.5
CHECKED = 64  # queries of a request that are compared with float64
TURNS = 3
# Tokens before and in the step, of each request.
STEPS: dict[str, list[tuple[int, int]]] = {
    "256 after 16,128": [(16128, 256)],
    "512 after 65,024": [(LONGEST - 512, 512)],
    "2,048 new": [(0, 2048)],
    "2,048 after 14,336": [(14336, 2048)],
    "2,048 after 63,488": [(LONGEST - 2048, 2048)],
    "8,192 new": [(0, 8192)],
    "8,192 after 8,192": [(8192, 8192)],
    "8,192 after 24,576": [(24576, 8192)],
    "8,192 after 57,344": [(LONGEST - 8192, 8192)],
    "four requests, 8,190": [(0, 3001), (5003, 1009), (17011, 2084), (40009, 2096)],
}


@dataclass
class Heads:
    """A class of heads: its bands and cache, both forms of its step, and queries and outputs."""

    pattern: spa.BandPattern
    cache: torch.Tensor
    in_place: Step
    gathered: Step
    query: torch.Tensor
    out: torch.Tensor

    def attend(self, step: Step) -> None:
        attend(self.query, self.cache, step, self.pattern, self.out, scale=SCALE)


def classes_of(pattern: spa.BandPattern, requests: list[tuple[int, int]]) -> Iterator[Heads]:
    """The classes of a layer, whose requests have all their blocks, in random places."""
    generator = torch.Generator("cuda").manual_seed(0)
    offsets = [0, *accumulate(new for _, new in requests)]
    lengths = [past + new for past, new in requests]
    starts, seq_lens = (
        torch.tensor(each, dtype=torch.int32, device="cuda") for each in (offsets, lengths)
    )
    group = pattern.num_heads // KV_HEADS
    for one in class_blocks(pattern, KV_HEADS):
        columns = -(-max(lengths) // one.tokens)
        blocks = len(requests) * columns
        shape = (blocks, len(one.part.kv_heads), one.tokens, 2 * HEAD_DIM)
        cache = torch.empty(shape, device="cuda", dtype=DTYPE).normal_(generator=generator)
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(0))
        table = order.int().view(len(requests), columns).cuda()
        heads = [head * group + i for head in one.part.kv_heads for i in range(group)]
        query = torch.randn(
            offsets[-1], len(heads), HEAD_DIM, device="cuda", dtype=DTYPE, generator=generator
        )
        yield Heads(
            select_heads(pattern, heads),
            cache,
            Step(None, PagedPrefills(0, offsets[-1], starts, table, seq_lens, max(lengths))),
            Step(None, prefills_of(offsets, lengths, table, one.tokens, one.part.window)),
            query,
            torch.empty_like(query),
        )


def check(heads: Heads, requests: list[tuple[int, int]], step: Step) -> None:
    """Compare the last queries of each request, in the first head, with float64."""
    heads.out.fill_(float("nan"))
    heads.attend(step)
    prefills = heads.in_place.prefills
    assert isinstance(prefills, PagedPrefills)
    ends = accumulate(new for _, new in requests)
    for row, end, (past, new) in zip(prefills.block_table, ends, requests):
        rows = slice(end - min(new, CHECKED), end)
        text = heads.cache[row.long(), 0].flatten(0, 1)[: past + new]
        key, value = text[None, None].split(HEAD_DIM, dim=-1)
        query, out = (each[rows, :1].transpose(0, 1)[None] for each in (heads.query, heads.out))
        case = Case(query, key, value, heads.pattern.heads(0, 1))
        check_error("out", out, plain(case)["out"], exact(case)["out"])


def time_step(classes: list[Heads]) -> dict[str, float]:
    """Medians of turns: of reading in place, in turn and side by side, and of gathering."""

    def run(form: str) -> None:
        for heads in classes:
            heads.attend(getattr(heads, form))

    def copy() -> None:
        for heads in classes:
            gather(heads.cache, heads.gathered.prefills)  # type: ignore[arg-type]

    streams = ClassStreams(len(classes), classes[0].cache.device)

    def run_side_by_side() -> None:
        streams.run([partial(heads.attend, heads.in_place) for heads in reversed(classes)])

    calls: dict[str, Callable[[], None]] = {
        "in_place": partial(run, "in_place"),
        "side_by_side": run_side_by_side,
        "gathered": partial(run, "gathered"),
        "copies_alone": copy,
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(TURNS):
        for name, call in calls.items():
            times[name].append(per_call([call], 2))
    return {name: statistics.median(found) for name, found in times.items()}


def rows_of(kernels: str, patterns: list[str], names: list[str]) -> Iterator[dict[str, Any]]:
    """A row for each pattern and step."""
    for name in patterns:
        for step in names:
            requests = STEPS[step]
            classes = list(classes_of(PATTERNS[name], requests))
            for heads in classes:
                check(heads, requests, heads.in_place)
                check(heads, requests, heads.gathered)
            yield {
                "pattern": name,
                "kernels": kernels,
                "step": step,
                "block_sizes": [heads.cache.shape[2] for heads in classes],
                **time_step(classes),
            }


def main() -> int:
    """Check, time and write after each row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path)
    names = sorted(PATTERNS, reverse=True)
    parser.add_argument("--patterns", nargs="+", choices=names, default=names)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--kernels", nargs="+", choices=("hopper", "portable"), default=["hopper"])
    parser.add_argument("--commit", help="where git cannot tell it")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for kernels in options.kernels:
        versions = planning.TRITON_VERSIONS if kernels == "hopper" else ()
        with mock.patch.object(planning, "TRITON_VERSIONS", versions):
            for row in rows_of(kernels, options.patterns, options.steps):
                rows.append(row)
                print(row, flush=True)
                what = "attention of prompts over a paged cache, in place and gathered"
                save(options.output, what, {"checked": CHECKED}, rows, options.commit)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
