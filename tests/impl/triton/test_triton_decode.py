"""Every feature of the decoding kernels on small cases, in Triton's interpreter."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_cases import case, int32, rings

import spattention as spa
from spattention.impl import triton as kernels
from spattention.impl.triton import op
from spattention.impl.triton.decode import op as decode_op
from spattention.impl.triton.decode.config import DecodeLaunch, merged_rows
from spattention.impl.triton.decode.counters import ArrivalCounters, arrival_counters
from spattention.impl.triton.decode.plan import make_plan
from spattention.testing import Case, check_case, check_error, exact, plain
from tests.views import VIEWS, check_view

pytestmark = pytest.mark.skipif(not op.INTERPRETED, reason="the kernels run on the GPU here")
P = spa.BandPattern
TWO_BANDS = P((((0, 3), (7, 12)), ((0, 30),), (), ((2, 5), (20, 60))), 60)


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the queries that the decoding operator got; no test may go another way."""
    seen: list[torch.Size] = []
    decode = decode_op.decode

    def watched(query: torch.Tensor, *rest: Any) -> Any:
        seen.append(query.shape)
        return decode(query, *rest)

    monkeypatch.setattr(decode_op, "decode", watched)
    return seen


def _case(
    pattern: spa.BandPattern, queries: int = 1, keys: int = 130, *rest: Any, **options: Any
) -> Case:
    return case(pattern, queries, keys, *rest, **options)


CASES = {
    "one query, one head a group": lambda: _case(P.exclusive(3, 130)),
    "two bands, empty heads, sinks": lambda: _case(TWO_BANDS, sinks=True),
    "grouped heads": lambda: _case(P.shared_local(4, 130), key_heads=2),
    "all heads in one group, an empty head, sinks": lambda: _case(
        TWO_BANDS, key_heads=1, sinks=True
    ),
    "a group without keys": lambda: _case(P(((), (), ((3, 40),), ()), 60), key_heads=2),
    "nothing to see": lambda: _case(P(((), ()), 4), sinks=True),
    "three queries, geometric, float16": lambda: _case(
        P.shared_local(2, 130, widths="geometric", local=9), 3, dtype=torch.float16
    ),
    "sixteen queries, grouped, two bands": lambda: _case(TWO_BANDS, 16, key_heads=2, sinks=True),
    "more rows than a block": lambda: _case(P.shared_local(8, 130), 16, key_heads=1, batch=1),
    "one query of an odd head_dim, float16": lambda: _case(
        P.exclusive(2, 130), head_dim=20, dtype=torch.float16
    ),
    "queries of an odd head_dim": lambda: _case(P.exclusive(2, 130), 2, head_dim=20),
    "text shorter than the bands": lambda: _case(P.exclusive(3, 400), 2, keys=50),
    "start on the device": lambda: _case(TWO_BANDS, query_start=int32(4, 89)),
    "one start on the device": lambda: _case(
        TWO_BANDS, 3, key_heads=2, query_start=torch.tensor(60, dtype=torch.int32)
    ),
    "start on the device beyond the keys": lambda: _case(
        TWO_BANDS, 4, key_heads=2, query_start=int32(129, 150)
    ),
    "a start given as a number": lambda: _case(TWO_BANDS, 2, query_start=17),
    "left padding": lambda: _case(P.shared_local(2, 130), key_start=int32(30, 200)),
    "left padding of three queries": lambda: _case(TWO_BANDS, 3, key_start=int32(128, 100)),
    "documents in a row": lambda: _case(
        TWO_BANDS, 4, key_heads=2, key_start=int32([[0, 0, 90, 129], [20, 128, 128, 128]])
    ),
    "negative scale": lambda: _case(P.exclusive(2, 130), 2, scale=-0.3),
    "negative scale of one query": lambda: _case(P.exclusive(2, 130), scale=-0.3),
    "scale of zero": lambda: _case(P.exclusive(2, 130), scale=0.0),
}


@pytest.mark.parametrize("name", CASES)
def test_feature(name: str, calls: list[torch.Size]) -> None:
    check_case(CASES[name](), impl="triton", backward=False)
    assert len(calls) == 1


@pytest.mark.parametrize("queries", [1, 3])
def test_only_keys_in_the_bands_are_read(queries: int) -> None:
    """Everything else is NaN: between the bands, before the padding's end, after the last query."""
    case = _case(TWO_BANDS, queries, query_start=int32(80, 41), key_start=int32(0, 30))
    seen = torch.zeros(2, 4, 130, dtype=torch.bool)
    for row, (start, first) in enumerate(((80, 0), (41, 30))):
        mask = TWO_BANDS.mask(queries, 130, query_start=start).any(dim=1)
        seen[row] = mask & (torch.arange(130) >= first)
    wanted, rough = exact(case), plain(case)
    hidden = Case(
        case.query,
        case.key.masked_fill(~seen[..., None], torch.nan),
        case.value.masked_fill(~seen[..., None], torch.nan),
        case.pattern,
        case.options,
    )
    out, lse = spa.band_attention(
        hidden.query, hidden.key, hidden.value, TWO_BANDS, return_lse=True, impl="triton",
        **hidden.options,
    )  # fmt: skip
    check_error("out", out, rough["out"], wanted["out"])
    check_error("lse", lse, rough["lse"], wanted["lse"])


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("view", VIEWS)
def test_any_memory_order_gives_the_same(view: str, place: int) -> None:
    check_view(view, place, "triton", backward=False, queries=2)


def test_strides_are_taken_as_they_are() -> None:
    case = _case(P.exclusive(2, 130), batch=1)
    wide = torch.randn(1, 130, 2, 40, generator=torch.Generator().manual_seed(1))
    key, value = wide[..., :16].transpose(1, 2), wide[..., 24:].transpose(1, 2)
    case = replace(case, key=key, value=value)
    check_case(case, impl="triton", backward=False)


def test_hostile_starts_stay_in_bounds() -> None:
    """The interpreter reads real memory: a wild address ends the process."""
    case = _case(TWO_BANDS, 3, key_heads=2)
    for start in (-(2**31), 2**31 - 1):
        for options in (
            {"query_start": int32(start, 5)},
            {"key_start": int32([[start] * 3, [7, -9, start]])},
        ):
            decode_op.decode(
                case.query, case.key, case.value, case.pattern.flat, 0, 0.3, 127,
                options.get("query_start"), options.get("key_start"), *[None] * 5,
            )  # fmt: skip


def test_many_queries_and_gradients_go_the_other_way(calls: list[torch.Size]) -> None:
    case = _case(P.exclusive(2, 130), 17)
    spa.band_attention(case.query, case.key, case.value, case.pattern, impl="triton")
    case = _case(P.exclusive(2, 130), 2, keys=15)
    spa.band_attention(case.query, case.key, case.value, case.pattern, impl="triton")
    case = _case(P.exclusive(2, 130))
    spa.band_attention(
        case.query, case.key.requires_grad_(), case.value, case.pattern, impl="triton"
    )
    assert not calls
    with torch.no_grad():
        spa.band_attention(case.query, case.key, case.value, case.pattern, impl="triton")
    assert len(calls) == 1


SPAN = 20
SHORT = P((((0, 3), (5, 7)), ((0, 17),), (), ((2, 4), (9, 20))), SPAN)
RINGS = {
    "exclusive": (P.exclusive(3, SPAN), 3),
    "shared_local, geometric": (P.shared_local(4, SPAN, widths="geometric", local=5), 2),
    "two bands, an empty head": (SHORT, 4),
    "one group": (SHORT, 1),
    "a group without keys": (P(((), (), ((3, 20),), ()), SPAN), 2),
}
PIECES = [1, 9, 16, 1, 12, 3, 11]  # 53 tokens, 2.65 spans


@pytest.mark.parametrize("name", RINGS)
def test_rings_past_their_span(name: str) -> None:
    """One to sixteen tokens at a time, with sinks and left padding, for more than 2.5 spans."""
    pattern, key_heads = RINGS[name]
    total = sum(PIECES)
    sinks = torch.linspace(-1, 1, pattern.num_heads)
    start = int32([9])
    case = _case(pattern, total, total, key_heads, batch=1)
    case = replace(case, options={"sinks": sinks, "key_start": start})
    store = spa.BandStore(pattern, 1, key_heads, 16)
    outs, lses = [], []
    parts = (t.split(PIECES, dim=2) for t in (case.query, case.key, case.value))
    for query, key, value in zip(*parts):
        store.append(key, value)
        out, lse = kernels.attend_rings(
            query, store.keys, store.values, pattern, **rings(store), scale=0.25, sinks=sinks,
            key_start=start,
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
    truth, rough = exact(case), plain(case)
    check_error("out", torch.cat(outs, dim=2), rough["out"], truth["out"])
    check_error("lse", torch.cat(lses, dim=2), rough["lse"], truth["lse"])


def test_padding_between_the_tokens_of_a_store(
    calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `band_attention_cached` gives the kernels: every sequence has what it has alone."""
    for module in ("cache", "cached_attention"):
        monkeypatch.setattr(f"spattention.{module}.kernels_for", lambda *_: kernels)
    pieces = [9, 1, 3, 1, 12]
    sinks = torch.linspace(-1, 1, 4)
    case = _case(SHORT, sum(pieces), sum(pieces), 2, batch=2)
    mask = torch.rand(2, sum(pieces), generator=torch.Generator().manual_seed(0)) > 0.3
    store = spa.BandStore(SHORT, 2, 2, 16, max_rollback=11)
    outs, lses = [], []
    for some in torch.arange(sum(pieces)).split(pieces):
        query, key, value = (t[:, :, some] for t in (case.query, case.key, case.value))
        out, lse = spa.band_attention_cached(
            query, store, SHORT, key, value, sinks=sinks, mask=mask[:, some], return_lse=True
        )
        outs.append(out)
        lses.append(lse)
    assert [shape[2] for shape in calls] == pieces[1:]
    assert store.position.tolist() == mask.sum(dim=1).tolist()
    out, lse = torch.cat(outs, dim=2), torch.cat(lses, dim=2)
    for row, real in enumerate(mask):
        tokens = (t[row : row + 1, :, real] for t in (case.query, case.key, case.value))
        alone = Case(*tokens, SHORT, {"sinks": sinks})
        truth, rough = exact(alone), plain(alone)
        check_error("out", out[row : row + 1, :, real], rough["out"], truth["out"])
        check_error("lse", lse[row : row + 1, :, real], rough["lse"], truth["lse"])
        assert not out[row, :, ~real].any()


def test_an_empty_store_and_rows_of_different_lengths() -> None:
    store = spa.BandStore(TWO_BANDS, 2, 2, 16)
    query = torch.randn(2, 4, 2, 16)

    def attend() -> torch.Tensor:
        return kernels.attend_rings(
            query, store.keys, store.values, TWO_BANDS, **rings(store), scale=0.25, sinks=None,
            key_start=None,
        )[0]  # fmt: skip

    assert torch.equal(attend(), torch.zeros(2, 4, 2, 16))
    case = _case(TWO_BANDS, 2, 100, 2)
    store.append(case.key, case.value)
    store.position[1] += 2**33 * int(store.lengths[0]) * int(store.lengths[1])
    query = torch.cat([case.query[:1]] * 2)
    store.keys[1], store.values[1] = store.keys[0], store.values[0]
    out = attend()
    assert torch.equal(out[0], out[1])  # a position beyond 32 bits, at the same place of each ring


def test_chunks_cover_what_a_group_reaches_once() -> None:
    rng = random.Random(0)
    for _ in range(300):
        heads, span, queries = rng.choice((1, 2, 4, 6)), rng.randint(4, 3000), rng.randint(1, 16)
        intervals = []
        for _ in range(heads):
            edges = sorted(rng.sample(range(span + 1), 4))
            pair = ((edges[0], edges[1]), (edges[2], edges[3]))
            intervals.append(pair[: rng.choice((0, 1, 2))])
        pattern = P(tuple(intervals), span)
        key_heads = rng.choice([n for n in (1, 2, 3, 6) if heads % n == 0])
        launch = DecodeLaunch(16, 16, 4, 1, programs=rng.choice((1, 4)), longest=64, many=32)
        made = make_plan(
            launch, pattern.flat, key_heads, queries, rng.randint(1, 3), 4, torch.device("cpu")
        )
        count = torch.zeros(key_heads, span + 16, dtype=torch.int64)
        ranges = made.ranges.flatten().tolist()
        for index, (key_head, near, far, _, first, parts, *_) in enumerate(made.chunks.tolist()):
            assert ranges[key_head] <= index < ranges[key_head + 1]
            assert (first, first + parts) == (ranges[key_head], ranges[key_head + 1])
            assert near < far or parts == 1  # a head without keys has one chunk without keys
            assert far - near <= 64
            count[key_head, near:far] += 1
        reached = torch.zeros_like(count, dtype=torch.bool)
        for head, bands in enumerate(intervals):
            for near, far in bands:
                reached[head // (heads // key_heads), near : far + queries - 1] = True
        assert torch.equal(count, reached.long())
        assert made.n_chunks == len(made.chunks) == ranges[-1]


def test_few_keys_are_cut_for_one_wave() -> None:
    """As long as all programs run at once they are as short as possible, and equally long."""
    launch = DecodeLaunch(1, 64, 4, 1, programs=2, longest=1024, many=512)
    assert launch.chunk([4096] * 16, 1, 132) == 256
    assert launch.chunk([256] * 16, 1, 132) == 64
    assert launch.chunk([4096] * 16, 4, 132) == 1024
    assert launch.chunk([4096] * 16, 32, 132) == 512  # more than a wave


def test_counters_are_zero_again() -> None:
    """A launch leaves them as the next one needs them."""
    _attend(P.shared_local(4, 130), rows=4)
    assert arrival_counters.of_stream
    assert not any(counters.any() for counters in arrival_counters.of_stream.values())


def test_counters_grow_and_stay() -> None:
    """A launch that is still running may be using the old ones."""
    counters = ArrivalCounters()
    device = torch.device("cpu")
    first = counters.get(device, 5)
    assert counters.get(device, 5) is first
    many = counters.get(device, 2 * len(first))
    assert len(many) >= 2 * len(first)
    assert [kept.data_ptr() for kept in counters.retained] == [first.data_ptr(), many.data_ptr()]


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_one_launch_equals_two(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last program of a head gives what a second launch would, but for the last bit."""
    pattern = P((((0, 30), (40, 90)),) * rows, 130)
    assert merged_rows(rows) >= rows
    one = _attend(pattern, rows)
    monkeypatch.setattr("spattention.impl.triton.decode.launch.merged_rows", lambda rows: 0)
    for merged, combined in zip(one, _attend(pattern, rows)):
        torch.testing.assert_close(merged, combined, rtol=1e-6, atol=1e-6)


def _attend(pattern: spa.BandPattern, rows: int) -> Any:
    case = _case(pattern, key_heads=1, sinks=True)
    sinks = case.options["sinks"]
    given = case.query, case.key, case.value, case.pattern
    return spa.band_attention(*given, sinks=sinks, return_lse=True, impl="triton")


def test_many_rows_are_merged_by_a_second_launch() -> None:
    """One program would merge them longer than a launch takes."""
    assert [merged_rows(rows) for rows in (1, 2, 3, 5, 16, 17, 128)] == [1, 2, 4, 8, 16, 0, 0]


@pytest.mark.parametrize("prefix", [0, 4])
def test_chunks_beyond_the_text_are_not_merged(
    prefix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their programs store nothing, so what their memory held before must not matter."""
    new_empty = torch.Tensor.new_empty

    def new_nan(tensor: torch.Tensor, *shape: Any, **options: Any) -> torch.Tensor:
        made = new_empty(tensor, *shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", new_nan)
    pattern = P((((0, 3), (90, 400)), ((0, 400),), (), ((300, 400),)), 400, prefix=prefix)
    case = _case(pattern, keys=50, key_heads=2, query_start=int32(40, 3), sinks=True)
    check_case(case, impl="triton", backward=False)
