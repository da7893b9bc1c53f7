"""Attention of decoding steps over paged caches, as a serving engine runs them, on one GPU.

Three parts, each a list of rows: one step at equal lengths, beside dense attention; a queue of
requests that share the memory of one layer, each pattern with as many as fit; and the distance of
contiguous and paged decoding from the time in which a copy would move the same bytes.

Times are medians of replays of a CUDA graph, per call. A graph holds several calls, as a model has
layers, each over other blocks, so that a call finds none of its keys in the cache of the GPU.
Correctness comes first: every kind of call is compared with float64.

    python -m benchmarks.serving_replay --output benchmarks/results/serving_replay.json
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import spattention as spa
from spattention.benchmarking.results import write_rows
from spattention.benchmarking.timing import copy_speed
from spattention.serving import paged_attention
from spattention.serving.class_streams import ClassStreams
from spattention.serving.head_classes import select_heads
from spattention.serving.paged import Decodes, PagedPrefills, Step, attend
from spattention.testing import Case, check_error, exact, plain

from .serving_memory import (
    LONGEST,
    ClassBlocks,
    admitted,
    class_blocks,
    draw_lengths,
    request_bytes,
)
from .serving_patterns import HEAD_DIM, HEADS, KV_HEADS, LOCAL, PATTERNS

DTYPE, ITEMSIZE = torch.bfloat16, 2
TOKEN = 2 * HEAD_DIM * ITEMSIZE  # bytes of key and value of a token in one head
P = spa.BandPattern
SHAPES = {
    "geometric, 32 / 8 heads": (PATTERNS["geometric"], KV_HEADS),
    "shared_local, 16 / 16 heads": (P.shared_local(16, LONGEST), 16),
}
FORMS = 7  # processes that compile, each some of the kernels
DENSE_BACK_ENDS = {
    "FlashAttention": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}
Call = Callable[[], Any]


@dataclass
class ClassCache:
    """The cache of one class of heads, with the requests' blocks in random places.

    Attributes:
        pattern: the bands of the class.
        query_heads: how many query heads it has.
        cache: `[blocks, heads, tokens, 2 * D]`.
        table: int32 `[R, columns]`; blocks that are freed are block 0, which is nobody's.
    """

    pattern: P
    query_heads: int
    cache: torch.Tensor
    table: torch.Tensor


def class_cache(
    pattern: P, one: ClassBlocks, lengths: Sequence[int], generator: torch.Generator
) -> ClassCache:
    """Fill the blocks that requests of these lengths hold."""
    group = pattern.num_heads // KV_HEADS
    heads = [head * group + i for head in one.part.kv_heads for i in range(group)]
    held = [one.held(length) for length in lengths]
    shape = (sum(held) + 1, len(one.part.kv_heads), one.tokens, 2 * HEAD_DIM)
    cache = torch.empty(shape, device="cuda", dtype=DTYPE)
    for part in cache.split(4096):
        part.normal_(generator=generator)
    order = (torch.randperm(sum(held), generator=torch.Generator().manual_seed(0)) + 1).int()
    columns = max(-(-length // one.tokens) for length in lengths)
    table = torch.zeros(len(lengths), columns, dtype=torch.int32)
    for row, (length, blocks) in enumerate(zip(lengths, order.split(held))):
        first = one.freed(length)
        table[row, first : first + len(blocks)] = blocks
    return ClassCache(select_heads(pattern, heads), len(heads), cache, table.cuda())


@dataclass
class LayerStep:
    """One decoding step of one layer: a call for each class of heads.

    Attributes:
        calls: the calls, by class; each takes its queries.
        caches, queries, outs: what they read and write, by class.
        streams: those on which the classes run side by side.
    """

    calls: Sequence[Callable[[torch.Tensor], None]]
    caches: list[ClassCache]
    queries: list[torch.Tensor]
    outs: list[torch.Tensor]
    streams: ClassStreams

    def in_turns(self) -> list[torch.Tensor]:
        """One class after the other."""
        for call, query in zip(self.calls, self.queries):
            call(query)
        return self.outs

    def side_by_side(self) -> list[torch.Tensor]:
        """Each class on a stream of its own."""
        self.streams.run([partial(call, query) for call, query in zip(self.calls, self.queries)])
        return self.outs


def step_of(pattern: P, lengths: Sequence[int], classes: Sequence[ClassBlocks]) -> LayerStep:
    """One decoding step over random keys in random blocks."""
    generator = torch.Generator("cuda").manual_seed(0)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    caches = [class_cache(pattern, one, lengths, generator) for one in classes]
    queries = [
        torch.randn(len(lengths), one.query_heads, HEAD_DIM, device="cuda", generator=generator).to(
            DTYPE
        )
        for one in caches
    ]
    outs = [torch.empty_like(query) for query in queries]
    calls = [
        partial(
            attend,
            cache=one.cache,
            step=Step(Decodes(one.table, seq_lens), None),
            pattern=one.pattern,
            out=out,
            scale=HEAD_DIM**-0.5,
        )
        for one, out in zip(caches, outs)
    ]
    return LayerStep(calls, caches, queries, outs, ClassStreams(len(calls), seq_lens.device))


def check_step(step: LayerStep, run: Call, length: int) -> None:
    """Compare the first request, which has this length, with float64, each class's first head."""
    for out in step.outs:
        out.fill_(float("nan"))
    for out, one, query in zip(run(), step.caches, step.queries):
        blocks = one.cache[one.table[0].long()]  # [columns, heads, tokens, 2 * D]
        text = blocks.transpose(0, 1).flatten(1, 2)[:1, :length]
        key, value = text[None].split(HEAD_DIM, dim=-1)
        case = Case(query[:1, :1, None], key, value, one.pattern.heads(0, 1))
        check_error("out", out[:1, :1, None], plain(case)["out"], exact(case)["out"])


def per_call(calls: Sequence[Call], rounds: int) -> float:
    """Median microseconds of a call in replays of a graph that makes all calls, `rounds` times."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (*calls, *calls):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(14):
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / (rounds * len(calls)))
    return statistics.median(times[4:])


def cold(call: Call) -> float:
    """Microseconds of a call that finds none of its keys in the cache of the GPU."""
    other = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    return 2 * per_call([call, other.zero_], 3) - per_call([other.zero_], 3)


def dense_by_pytorch(requests: int) -> Iterator[dict[str, Any]]:
    """Rows of `scaled_dot_product_attention` over all keys of requests of the longest length."""
    generator = torch.Generator("cuda").manual_seed(0)
    query = torch.randn(requests, HEADS, 1, HEAD_DIM, device="cuda", generator=generator).to(DTYPE)
    shape = (requests, KV_HEADS, LONGEST, HEAD_DIM)
    key, value = (torch.empty(shape, device="cuda", dtype=DTYPE) for _ in range(2))
    for tensor in (*key, *value):
        tensor.normal_(generator=generator)
    for name, back_end in DENSE_BACK_ENDS.items():

        def call(back_end: SDPBackend = back_end) -> torch.Tensor:
            with sdpa_kernel(back_end):
                return scaled_dot_product_attention(query, key, value, enable_gqa=True)

        row = {"attention": f"dense, {name}", "requests": requests, "length": LONGEST}
        try:
            yield row | {"microseconds": per_call([call], 3)}
        except RuntimeError as error:  # no kernel of this back end for the case
            yield row | {"not_run": str(error).strip().splitlines()[0]}


def timed_steps(name: str, step: LayerStep, length: int) -> Iterator[dict[str, Any]]:
    """Rows of a step with its classes in turns and, where there are several, side by side; the
    first request has this length.
    """
    ways = {"in turns": step.in_turns, "side by side": step.side_by_side}
    for way, run in ways.items():
        if way == "in turns" or len(step.calls) > 1:
            check_step(step, run, length)
            yield {
                "attention": f"{name}, paged",
                "classes": len(step.calls),
                "order": way,
                "microseconds": per_call([run], 3),
            }


def equal_lengths(memory: int, copy: float) -> Iterator[dict[str, Any]]:
    """Rows of requests of the longest length: one, as many as dense attention has room for, and as
    many as each pattern has. Also each class by itself, and a copy of what it reads.
    """
    classes = {name: class_blocks(pattern, KV_HEADS) for name, pattern in PATTERNS.items()}
    room = {name: memory // request_bytes(found, LONGEST, HEAD_DIM, ITEMSIZE)
            for name, found in classes.items()}  # fmt: skip
    for requests in (1, room["dense"]):
        yield from dense_by_pytorch(requests)
    for name, pattern in PATTERNS.items():
        for requests in sorted({1, room["dense"], room[name]}):
            lengths = [LONGEST] * requests
            row = {"requests": requests, "length": LONGEST, "most_requests": room[name]}
            step = step_of(pattern, lengths, classes[name])
            keys = [seen_keys(one.pattern, one.cache.shape[1]) for one in step.caches]
            each = {
                "class_copy_microseconds": [requests * n * TOKEN / copy / 1e6 for n in keys],
                "class_microseconds": [
                    cold(partial(call, query)) for call, query in zip(step.calls, step.queries)
                ],
            }
            for timed in timed_steps(name, step, LONGEST):
                yield timed | row | each


def mixed_lengths(memory: int) -> Iterator[dict[str, Any]]:
    """Rows of a queue of requests: all of which fit dense attention, then as many as fit each
    pattern.
    """
    lengths = draw_lengths(2000, 0)
    for name, pattern in PATTERNS.items():
        classes = class_blocks(pattern, KV_HEADS)
        dense = admitted(
            lengths, class_blocks(PATTERNS["dense"], KV_HEADS), memory, HEAD_DIM, ITEMSIZE
        )
        most = admitted(lengths, classes, memory, HEAD_DIM, ITEMSIZE)
        for requests in sorted({dense, most}):
            step = step_of(pattern, lengths[:requests], classes)
            row = {"requests": requests, "tokens": sum(lengths[:requests]), "most_requests": most}
            for timed in timed_steps(name, step, lengths[0]):
                yield timed | row


def seen_keys(pattern: P, kv_heads: int) -> int:
    """Keys of a request of the longest length that one query reads, over all key/value heads."""
    mask = pattern.mask(1, LONGEST)[:, 0]
    return int(mask.unflatten(0, (kv_heads, -1)).any(dim=1).sum())


def texts(pattern: P, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One query `[16, H, 1, D]` of 16 requests of the longest length, and their keys and values
    `[2, 16, tokens, Hkv, D]`.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    cache = torch.empty(2, 16, LONGEST, kv_heads, HEAD_DIM, device="cuda", dtype=DTYPE)
    for tensor in (*cache[0], *cache[1]):
        tensor.normal_(generator=generator)
    query = torch.randn(16, pattern.num_heads, 1, HEAD_DIM, device="cuda", generator=generator)
    return query.to(DTYPE), cache


def layouts(
    pattern: P, query: torch.Tensor, cache: torch.Tensor
) -> dict[str, Callable[[slice], torch.Tensor]]:
    """Decoding of some of the requests of `texts`, over contiguous keys, and over the same memory
    as `[2, blocks, 16, Hkv, D]` in random order.
    """
    kv_heads = cache.shape[3]
    key, value = cache.transpose(2, 3)  # [16, Hkv, tokens, D]
    pages = cache.view(2, LONGEST, 16, kv_heads, HEAD_DIM)
    order = torch.randperm(LONGEST, generator=torch.Generator().manual_seed(0))
    tables = [blocks.view(16, -1).to("cuda", torch.int32) for blocks in (order, order.sort()[0])]
    seq_lens = torch.full((16,), LONGEST, dtype=torch.int32, device="cuda")

    def contiguous(rows: slice) -> torch.Tensor:
        out = spa.band_attention(query[rows], key[rows], value[rows], pattern)
        assert isinstance(out, torch.Tensor)
        return out

    def paged(rows: slice, table: torch.Tensor = tables[0]) -> torch.Tensor:
        out = paged_attention(query[rows], pages[0], pages[1], table[rows], seq_lens[rows], pattern)
        assert isinstance(out, torch.Tensor)
        return out

    some = slice(3, 5)
    for head in (0, pattern.num_heads - 1):
        heads = slice(head, head + 1), slice(head * kv_heads // pattern.num_heads, None)
        case = Case(
            query[some, heads[0]],
            key[some, heads[1]][:, :1],
            value[some, heads[1]][:, :1],
            pattern.heads(head, head + 1),
        )
        for found in (contiguous(some), paged(some, tables[1])):
            check_error("out", found[:, heads[0]], plain(case)["out"], exact(case)["out"])
    return {"contiguous": contiguous, "paged": paged}


def limits(copy: float) -> Iterator[dict[str, Any]]:
    """Rows of contiguous and paged decoding of one request and of 16, beside a copy's time."""
    for name, (pattern, kv_heads) in SHAPES.items():
        attends = layouts(pattern, *texts(pattern, kv_heads))
        for requests in (1, 16):
            parts = [slice(i, i + requests) for i in range(0, 16, requests)][:8]
            moved = requests * seen_keys(pattern, kv_heads) * TOKEN
            for layout, attend_rows in attends.items():
                time = per_call([partial(attend_rows, part) for part in parts], 3)
                yield {
                    "pattern": name,
                    "requests": requests,
                    "layout": layout,
                    "microseconds": time,
                    "copy_microseconds": moved / copy / 1e6,
                    "of_a_copy": moved / copy / 1e6 / time,
                }
        del attends


def warm_prefill(pattern: P) -> None:
    """Compile the kernels of `serving_steps.py` for new tokens of one request and of two."""
    lengths, offsets = [4000] * 2, [0, 1000, 2000]
    for cache in step_of(pattern, lengths, class_blocks(pattern, KV_HEADS)).caches:
        query = torch.zeros(2000, cache.query_heads, HEAD_DIM, device="cuda", dtype=DTYPE)
        for n in (1, 2):
            starts, seq_lens = (
                torch.tensor(each, dtype=torch.int32, device="cuda")
                for each in (offsets[: n + 1], lengths[:n])
            )
            table = cache.table[:n]
            prefills = PagedPrefills(0, offsets[n], starts, table, seq_lens, lengths[0])
            out, scale = torch.empty_like(query), HEAD_DIM**-0.5
            attend(query, cache.cache, Step(None, prefills), cache.pattern, out, scale=scale)


def warm(form: int) -> None:
    """Compile some of the kernels into Triton's cache on disk: one step each, of short requests."""
    lengths = [4000] * 8
    if form < len(PATTERNS):
        pattern = list(PATTERNS.values())[form]
        step_of(pattern, lengths, class_blocks(pattern, KV_HEADS)).in_turns()
        return
    if form >= FORMS - len(PATTERNS):
        warm_prefill(list(PATTERNS.values())[form - FORMS])
    pattern, kv_heads = list(SHAPES.values())[form % 2]
    query = torch.zeros(8, pattern.num_heads, 1, HEAD_DIM, device="cuda", dtype=DTYPE)
    cache = torch.zeros(2, 64, 16, kv_heads, HEAD_DIM, device="cuda", dtype=DTYPE)
    if form < len(PATTERNS) + 2:
        table = torch.zeros(8, 64, dtype=torch.int32, device="cuda")
        seq_lens = torch.full((8,), 1000, dtype=torch.int32, device="cuda")
        paged_attention(query, cache[0], cache[1], table, seq_lens, pattern)
    else:
        key, value = cache.view(2, 8, -1, kv_heads, HEAD_DIM).transpose(2, 3)
        spa.band_attention(query, key, value, pattern)


def save(
    output: Path | None,
    what: str,
    settings: dict[str, Any],
    rows: list[dict[str, Any]],
    commit: str | None,
) -> None:
    """Write the rows so far, with the GPU and Triton that gave them, if a file was named."""
    if output is not None:
        environment = {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__}
        write_rows(output, what, settings, rows, commit=commit, environment=environment)


def main() -> int:
    """Check, time and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory", type=int, default=1 << 31, help="bytes of one layer's cache")
    parser.add_argument("--commit", help="where git cannot tell it")
    parser.add_argument("--warm", type=int, help="compile one part of the kernels and end")
    parser.add_argument("--compilers", type=int, default=FORMS, help="processes that compile first")
    options = parser.parse_args()
    if options.warm is not None:
        warm(options.warm)
        return 0
    command = [sys.executable, "-m", "benchmarks.serving_replay", "--warm"]
    compilers = [subprocess.Popen([*command, str(form)]) for form in range(options.compilers)]
    failed = [process.wait() for process in compilers]
    if any(failed):
        raise RuntimeError("a process that compiles kernels has failed")
    copy = copy_speed()
    rows: list[dict[str, Any]] = []
    parts = {
        "limits": limits(copy),
        "equal lengths": equal_lengths(options.memory, copy),
        "mixed lengths": mixed_lengths(options.memory),
    }
    settings = {"memory": options.memory, "copy_terabytes_per_second": copy}
    settings |= {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "local": LOCAL}
    for part, found in parts.items():
        for row in found:
            rows.append({"part": part, **row})
            print(rows[-1], flush=True)
            torch.cuda.empty_cache()
            what = "microseconds of the attention of one decoding step in one layer"
            save(options.output, what, settings, rows, options.commit)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
