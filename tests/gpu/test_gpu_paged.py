"""Decoding from paged caches on a GPU: against float64, in CUDA graphs, on streams of their own."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import spattention as spa
from spattention.impl.triton.decode.counters import arrival_counters
from spattention.serving import paged_attention
from spattention.serving.class_streams import ClassStreams
from spattention.testing import Case, check_error, exact, plain
from tests.serving.blocks import Paged, paged

from .cases import BRAIN, HALF, SINGLE

P = spa.BandPattern
SPAN = 700
GEOMETRIC = P.shared_local(16, SPAN, widths="geometric", local=90, kv_heads=4)
BY_HAND = P((((0, 1), (90, 300)), ((100, 101),), ((4, 9),), (), (), (), ((0, 600),), ()), SPAN)
# dtype, head_dim, key heads, pattern, block size, queries
VARIANTS: dict[str, tuple[torch.dtype, int, int, P, int, int]] = {
    "one query": (BRAIN, 128, 4, GEOMETRIC, 16, 1),
    "one query, prefix": (BRAIN, 128, 4, replace(GEOMETRIC, prefix=4), 64, 1),
    "drafts, prefix": (HALF, 64, 4, replace(BY_HAND, prefix=70), 256, 3),
    "many rows": (BRAIN, 128, 2, BY_HAND, 16, 16),
    "single precision": (SINGLE, 128, 8, BY_HAND, 16, 1),
    "an odd head_dim": (BRAIN, 80, 8, BY_HAND, 48, 1),
    "a slot per token": (BRAIN, 128, 4, replace(GEOMETRIC, prefix=4), 1, 1),
}


def _paged(name: str, seed: int) -> tuple[Paged, P]:
    dtype, head_dim, key_heads, pattern, block_size, queries = VARIANTS[name]
    rng = random.Random(seed)
    lengths = [rng.choice((0, 1, rng.randint(1, 3 * SPAN))) for _ in range(rng.choice((1, 5)))]
    case = paged(
        pattern,
        lengths,
        block_size,
        key_heads=key_heads,
        queries=queries,
        head_dim=head_dim,
        dtype=dtype,
        outer_first=rng.random() < 0.5,
        device="cuda",
        seed=seed,
    )
    return case, pattern


@pytest.mark.parametrize("name", VARIANTS)
def test_paged_kernels_equal_float64(name: str) -> None:
    """Whatever freed blocks hold, as exactly as a plain computation in the same precision."""
    for seed in range(8):
        case, pattern = _paged(name, seed)
        sinks = torch.linspace(-1, 1, pattern.num_heads, device="cuda") if seed % 2 else None
        out, lse = paged_attention(*case.given, pattern, sinks=sinks, return_lse=True)
        truth = case.expected(pattern, sinks=None if sinks is None else sinks.double())
        for row, (key, value) in enumerate(case.texts):
            queries = case.query.shape[2]
            if key.shape[2] < queries:
                torch.testing.assert_close(out[row].double(), truth[0][row], rtol=0.03, atol=0.03)
                continue
            alone = Case(case.query[row : row + 1], key, value, pattern, {"sinks": sinks})
            rough, wanted = plain(alone), exact(alone)
            check_error(f"seed {seed}, row {row}", out[row : row + 1], rough["out"], wanted["out"])
            check_error("lse", lse[row : row + 1], rough["lse"], wanted["lse"])


def test_graphs_have_counters_of_their_own() -> None:
    """Graphs captured one after the other replay at the same time, with the bits of plain calls."""
    cases = [_paged("one query", seed)[0] for seed in (1, 2, 3)]
    plain_calls = [paged_attention(*case.given, GEOMETRIC) for case in cases]
    graphs, outs = [], []
    for case in cases:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            many = [paged_attention(*case.given, GEOMETRIC) for _ in range(20)]
        graphs.append(graph)
        outs.append(many)
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(50):
        for graph, stream in zip(graphs, streams):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for many, wanted in zip(outs, plain_calls):
        assert all(torch.equal(out, wanted) for out in many)
    for counters in arrival_counters.of_stream.values():
        assert not counters.any()


def test_streams_have_counters_of_their_own() -> None:
    """Calls on two streams at the same time give the bits that they give alone."""
    case, _ = _paged("one query", 1)
    wanted = paged_attention(*case.given, GEOMETRIC)
    torch.cuda.synchronize()
    outs = []
    for _ in range(200):
        for stream in STREAMS:
            with torch.cuda.stream(stream):
                outs.append(paged_attention(*case.given, GEOMETRIC))
    torch.cuda.synchronize()
    assert all(torch.equal(out, wanted) for out in outs)


@pytest.mark.parametrize("captured", [True, False])
def test_classes_side_by_side_give_the_same_bits(captured: bool) -> None:
    """Layers of four classes of heads, whose queries are overwritten after each layer."""
    cases = [_paged("one query", seed)[0] for seed in (1, 2, 3, 4)]
    wanted = [paged_attention(*case.given, GEOMETRIC) for case in cases]
    streams = ClassStreams(len(cases), cases[0].query.device)
    queries = [torch.empty_like(case.query) for case in cases]
    layers: list[list[torch.Tensor]] = []

    def run() -> None:
        layers.clear()
        for _ in range(20):
            outs = [torch.full_like(out, 7.0) for out in wanted]
            for case, query in zip(cases, queries):
                query.copy_(case.query)
            streams.run(
                [
                    partial(paged_attention, query, *case.given[1:], GEOMETRIC, out=out)
                    for case, query, out in zip(cases, queries, outs)
                ]
            )
            for query in queries:
                query.fill_(float("nan"))
            layers.append([out.clone() for out in outs])
            for out in outs:
                out.fill_(float("nan"))

    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        for _ in range(20):
            graph.replay()
    else:
        run()
    torch.cuda.synchronize()
    for outs in layers:
        assert all(torch.equal(out, other) for out, other in zip(outs, wanted))


STREAMS: list[Any] = [torch.cuda.Stream() for _ in range(2)] if torch.cuda.is_available() else []


def test_a_graph_without_spare_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the zeros made ahead are used up, the graph fills its own."""
    case, _ = _paged("one query", 2)
    wanted = paged_attention(*case.given, GEOMETRIC)
    monkeypatch.setattr(arrival_counters, "ahead", {})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [paged_attention(*case.given, GEOMETRIC) for _ in range(3)]
    for _ in range(5):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(out, wanted) for out in outs)


def test_tables_change_between_replays() -> None:
    """A captured call reads the lengths and blocks that an engine has written since."""
    first, _ = _paged("one query, prefix", 4)
    pattern = VARIANTS["one query, prefix"][3]
    paged_attention(*first.given, pattern)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(*first.given, pattern)
    for length in (0, 1, 63, 64, 65, SPAN, 2 * SPAN):
        length = min(length, int(first.texts[0][0].shape[2]))
        first.seq_lens.fill_(length)
        first.block_table.copy_(first.block_table)
        graph.replay()
        wanted = paged_attention(*first.given, pattern)
        assert torch.equal(out.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("queries", [1, 4])
def test_a_store_with_a_prefix(queries: int) -> None:
    """Prefixes are read inside the kernel, long after the rings have dropped them."""
    pattern = P.shared_local(8, 300, widths="geometric", local=20, prefix=6)
    total = 400 + 40 * queries
    text = [torch.randn(2, n, total, 64, device="cuda").to(BRAIN) for n in (8, 4, 4)]
    start = torch.tensor([0, 37], dtype=torch.int32, device="cuda")
    store = spa.BandStore(pattern, 2, 4, 64, dtype=BRAIN, device="cuda")
    outs = []
    for parts in zip(*(t.split([400, *[queries] * 40], dim=2) for t in text)):
        outs.append(
            spa.band_attention_cached(parts[0], store, pattern, *parts[1:], key_start=start)
        )
    case = Case(*text, pattern, {"key_start": start})
    out = torch.cat(outs, dim=2)
    check_error("out", out, plain(case)["out"], exact(case)["out"])
