"""The decoding kernels on a GPU: random cases against float64, graphs, stores, sizes beyond 32
bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import spattention as spa
from spattention.impl.triton.decode import op as decode_op
from spattention.testing import Case, check_error, exact, plain, run

from .cases import BRAIN, poison_unseen
from .decode_cases import VARIANTS, Variant, draw

P = spa.BandPattern


@pytest.fixture
def fill_new_memory_with_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def _check(case: Case, found: dict[str, torch.Tensor], message: str = "") -> None:
    truth, rough = exact(case), plain(case)
    for name in truth:
        check_error(f"{message}{name}", found[name], rough[name], truth[name])


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the queries that the decoding operator got."""
    seen: list[torch.Size] = []
    decode = decode_op.decode

    def watched(query: torch.Tensor, *rest: Any) -> Any:
        seen.append(query.shape)
        return decode(query, *rest)

    monkeypatch.setattr(decode_op, "decode", watched)
    return seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fill_new_memory_with_nan")
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_random_cases(variant: Variant, decoded: list[torch.Size]) -> None:
    for seed in range(25):
        case = draw(variant, seed)
        _check(case, run(poison_unseen(case), impl="triton"), f"seed {seed}: ")
    assert len(decoded) == 25


@pytest.mark.parametrize("variant", VARIANTS[:9], ids=str)
def test_same_bits_on_every_run(variant: Variant) -> None:
    case = draw(variant, 3)
    first = run(case, impl="triton")
    for _ in range(5):
        again = run(case, impl="triton")
        assert all(torch.equal(first[name], again[name]) for name in first)


def _text(tokens: int, heads: int = 8, key_heads: int = 4, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(tokens)
    return [
        torch.randn(batch, n, tokens, 64, generator=generator, device="cuda").to(BRAIN)
        for n in (heads, key_heads, key_heads)
    ]


def _store(pattern: P, key: torch.Tensor, **options: Any) -> spa.BandStore:
    return spa.BandStore(
        pattern, key.shape[0], key.shape[1], key.shape[3], dtype=key.dtype, device="cuda", **options
    )


SPAN = 300
STORED = {
    "exclusive": P.exclusive(8, SPAN),
    "shared_local": P.shared_local(8, SPAN),
    "shared_local, geometric": P.shared_local(8, SPAN, widths="geometric", local=20),
    "by hand": P((((0, 1), (90, 300)), (), ((4, 9),), (), (), (), ((0, 300),), ((7, 8),)), SPAN),
}
PIECES = [200, 1, 1, 16, 3, 140, 17, 1, 7, *[16] * 12, *[1] * 60, 260, 1, 16, 2]


@pytest.mark.parametrize("name", STORED)
def test_stores_past_their_span(name: str, decoded: list[torch.Size]) -> None:
    """A prompt, tokens, drafts and chunks over three spans, with sinks and left padding."""
    pattern, total = STORED[name], sum(PIECES)
    assert total > 2.5 * SPAN
    query, key, value = _text(total)
    sinks = torch.linspace(-1, 1, 8, device="cuda").to(BRAIN)
    start = torch.tensor([0, 37], dtype=torch.int32, device="cuda")
    store, outs, lses = _store(pattern, key), [], []
    for parts in zip(*(t.split(PIECES, dim=2) for t in (query, key, value))):
        out, lse = spa.band_attention_cached(
            parts[0], store, pattern, *parts[1:], sinks=sinks, key_start=start, return_lse=True
        )
        outs.append(out)
        lses.append(lse)
    few = sum(piece <= 16 for piece in PIECES)
    assert sum(shape[2] <= 16 and shape[1] == 8 for shape in decoded) == few
    case = Case(query, key, value, pattern, {"sinks": sinks, "key_start": start})
    _check(case, {"out": torch.cat(outs, dim=2), "lse": torch.cat(lses, dim=2)})


def test_a_small_slack_limits_what_is_written_first(decoded: list[torch.Size]) -> None:
    pattern = STORED["shared_local"]
    query, key, value = _text(700)
    store, outs = _store(pattern, key, slack=2), []
    for parts in zip(*(t.split([350, 3, 4, 1, 2, 340], dim=2) for t in (query, key, value))):
        outs.append(spa.band_attention_cached(parts[0], store, pattern, *parts[1:]))
    assert [shape[2] for shape in decoded if shape[1] == 8] == [3, 1, 2]
    case = Case(query, key, value, pattern)
    check_error("out", torch.cat(outs, dim=2), plain(case)["out"], exact(case)["out"])


def _captured(step: Callable[[], Any], warm_ups: int = 1) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_ups):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        step()
    return graph


@pytest.mark.parametrize("queries", [1, 4])
def test_a_graph_replays_while_a_store_fills(queries: int) -> None:
    """Append and attend captured once, replayed for 1.2 spans."""
    pattern = STORED["shared_local"]
    query, key, value = _text(720)
    prompt = 340
    store = _store(pattern, key)
    spa.band_attention_cached(
        query[:, :, :prompt], store, pattern, key[:, :, :prompt], value[:, :, :prompt]
    )
    given = [t[:, :, :queries].clone() for t in (query, key, value)]
    out = torch.empty_like(given[0])

    def step() -> None:
        out.copy_(spa.band_attention_cached(given[0], store, pattern, *given[1:]))

    for kept, tensor in zip(given, (query, key, value)):
        kept.copy_(tensor[:, :, prompt : prompt + queries])
    graph = _captured(step)
    store.crop(queries)  # of the warm-up; a capture runs nothing
    outs = []
    for at in range(prompt, 700, queries):
        for kept, tensor in zip(given, (query, key, value)):
            kept.copy_(tensor[:, :, at : at + queries])
        graph.replay()
        outs.append(out.clone())
    end = prompt + len(outs) * queries
    assert store.position.tolist() == [end, end]
    case = Case(query[:, :, :end], key[:, :, :end], value[:, :, :end], pattern)
    truth, rough = exact(case)["out"], plain(case)["out"]
    check_error(
        "out", torch.cat(outs, dim=2), rough[:, :, prompt:end], truth[:, :, prompt:end]
    )  # fmt: skip


def test_a_graph_replays_over_a_static_cache() -> None:
    """Advancing positions on the device; what is not yet filled holds NaN."""
    pattern = STORED["by hand"]
    query, key, value = _text(600)
    cache = [torch.full_like(t, torch.nan) for t in (key, value)]
    start = torch.zeros(2, dtype=torch.int32, device="cuda")
    one, out = query[:, :, :1].clone(), torch.empty_like(query[:, :, :1])

    def step() -> None:
        out.copy_(spa.band_attention(one, *cache, pattern, query_start=start))

    graph = _captured(step)
    outs = []
    for at in range(0, 600, 7):
        one.copy_(query[:, :, at : at + 1])
        for held, tensor in zip(cache, (key, value)):
            held[:, :, : at + 1] = tensor[:, :, : at + 1]
        start.fill_(at)
        graph.replay()
        outs.append(out.clone())
    case = Case(query, key, value, pattern)
    truth, rough = exact(case)["out"][:, :, ::7], plain(case)["out"][:, :, ::7]
    check_error("out", torch.cat(outs, dim=2), rough, truth)


def test_first_call_inside_a_capture_raises() -> None:
    pattern = P.exclusive(5, 79)
    query, key, value = _text(79, 5, 5)
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="before the capture of a CUDA graph"),
        torch.cuda.graph(graph),
    ):
        spa.band_attention(query[:, :, :1], key, value, pattern)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_full_graph_compile_of_a_store(mode: str | None) -> None:
    """One graph, the same bits as without, and no copy of the store on the way."""
    pattern = P.shared_local(8, 4096)
    query, key, value = _text(4500, batch=8)
    stores = [_store(pattern, key) for _ in range(2)]
    for store in stores:
        for tensor in (store.keys, store.values, store.counts):
            torch._dynamo.mark_static_address(tensor)
        parts = (t[:, :, :4400] for t in (query, key, value))
        q, k, v = parts
        spa.band_attention_cached(q, store, pattern, k, v)

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, store: Any) -> torch.Tensor:
        return spa.band_attention_cached(q * 1, store, pattern, k, v) + 1

    compiled = torch.compile(step, fullgraph=True, mode=mode)
    with torch.no_grad():
        for at in range(4400, 4440):
            parts = [t[:, :, at : at + 1].contiguous() for t in (query, key, value)]
            torch.compiler.cudagraph_mark_step_begin()
            out = compiled(*parts, stores[0]).clone()
            assert torch.equal(out, step(*parts, stores[1]))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        compiled(*parts, stores[0])
        assert torch.cuda.max_memory_allocated() - before < stores[0].nbytes / 8


def test_full_graph_compile_of_a_static_cache() -> None:
    pattern = STORED["shared_local"]
    query, key, value = _text(500)

    def step(q: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        return spa.band_attention(q * 1, key, value, pattern, query_start=start) + 1

    compiled = torch.compile(step, fullgraph=True)
    for at in (3, 80, 499):
        start = torch.tensor([at, at // 2], dtype=torch.int32, device="cuda")
        one = query[:, :, at : at + 1].contiguous()
        assert torch.equal(compiled(one, start), step(one, start))


def test_opcheck() -> None:
    pattern = STORED["shared_local"]
    query, key, value = _text(64)
    start = torch.tensor([3, 40], dtype=torch.int32, device="cuda")
    arguments = (
        list(pattern.flat),
        pattern.prefix,
        0.1,
        0,
        start,
        start,
        torch.randn(8, device="cuda"),
    )
    operator = torch.ops.spattention.triton_decode.default
    for queries in (1, 3):
        few = query[:, :, :queries]
        torch.library.opcheck(operator, (few, key, value, *arguments, *[None] * 4))
    store = _store(pattern, key)
    store.append(key, value)
    arguments = (list(pattern.flat), pattern.prefix, 0.1, 0, store.position, None, None)
    rings = (store.keys, store.values, *arguments, store.offsets, store.lengths)
    torch.library.opcheck(operator, (query[:, :, :2], *rings, None, None))


@pytest.mark.parametrize("start", [-(2**31), -7, 2**30, 2**31 - 1])
def test_hostile_starts_stay_in_bounds(start: int) -> None:
    """Guard rows of NaN around the keys must not be read."""
    query = _text(3)[0]
    guarded = torch.full((3, 2, 4, 1600, 64), torch.nan, device="cuda", dtype=BRAIN)
    guarded[1] = 1
    keys = guarded[1]
    pattern = STORED["by hand"]
    wild = torch.tensor([start, 1500], dtype=torch.int32, device="cuda")
    for options in (
        {"query_start": wild},
        {"key_start": wild},
        {"key_start": wild[:, None].expand(2, 3)},
    ):
        out = spa.band_attention(query, keys, keys, pattern, **options)
        assert out.isfinite().all()
    assert guarded[0].isnan().all()
    assert guarded[2].isnan().all()


@pytest.mark.parametrize("queries", [1, 5])
def test_a_cache_beyond_32_bits(queries: int) -> None:
    """17 GB of keys and values; the last row of the batch against float64, head by head."""
    batch, heads, length = 32, 16, 65_536
    shape = (batch, heads, length, 128)
    assert batch * heads * length * 128 > 2**31
    key, value = (torch.empty(shape, device="cuda", dtype=BRAIN) for _ in range(2))
    generator = torch.Generator("cuda").manual_seed(0)
    for tensor in (key, value):
        for row in tensor:
            row.normal_(generator=generator)
    query = torch.randn(batch, heads, queries, 128, generator=generator, device="cuda").to(BRAIN)
    pattern = P.shared_local(heads, length)
    out, lse = spa.band_attention(query, key, value, pattern, return_lse=True)
    for row, head in ((0, 0), (31, 0), (31, 7), (31, 15)):
        at = (slice(row, row + 1), slice(head, head + 1))
        case = Case(query[at], key[at], value[at], pattern.heads(head, head + 1))
        _check(case, {"out": out[at], "lse": lse[at]}, f"row {row}, head {head}: ")


def test_a_store_beyond_32_bits() -> None:
    """Positions above 2 ** 32 in buffers of more than 2 ** 31 elements."""
    batch, heads, length = 48, 16, 65_536
    pattern = P.exclusive(heads, length)
    store = spa.BandStore(pattern, batch, heads, 128, dtype=BRAIN, device="cuda")
    assert store.keys.numel() > 2**31
    key, value = (
        torch.randn(batch, heads, 300, 128, device="cuda").to(BRAIN) for _ in range(2)
    )  # fmt: skip
    store.position.fill_(2**32 + 77)
    store.append(key, value)
    query = torch.randn(batch, heads, 3, 128, device="cuda").to(BRAIN)
    out = spa.band_attention_cached(query, store, pattern)
    # Head 0 sees the 300 new tokens and, before them, slots that are still zero.
    zeros = torch.zeros(1, 1, 4096 - 298, 128, device="cuda", dtype=BRAIN)
    for row in (0, 47):
        keys, values = (torch.cat([zeros, t[row : row + 1, :1]], dim=2) for t in (key, value))
        case = Case(query[row : row + 1, :1], keys, values, pattern.heads(0, 1))
        check_error("out", out[row : row + 1, :1], plain(case)["out"], exact(case)["out"])
