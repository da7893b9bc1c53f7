"""BandStore and band_attention_cached: what comes out is what the whole sequence gives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spattention as spa
from spattention import cache_layout
from spattention.bands import MAX_INTERVALS
from spattention.cache_layout import ring_lengths
from spattention.testing import Case, check_error, exact, plain

P = spa.BandPattern
SPAN = 23
HEADS = 4
HAND_MADE = P(intervals=(((0, 1), (9, 23)), (), ((4, 9),), ()), span=SPAN)
PATTERNS = {
    "dense": P.dense(HEADS, SPAN),
    "sliding_window": P.sliding_window(HEADS, SPAN, 7),
    "exclusive": P.exclusive(HEADS, SPAN),
    "exclusive_geometric": P.exclusive(HEADS, SPAN, widths="geometric", first=2),
    "exclusive_equal_work": P.exclusive(HEADS, SPAN, widths="equal_work"),
    "shared_local": P.shared_local(HEADS, SPAN),
    "shared_local_geometric": P.shared_local(HEADS, SPAN, widths="geometric", first=2, local=3),
    "gapped": P.gapped(HEADS, SPAN),
    "local_only": P.local_only(HEADS, SPAN),
    "hand_made": HAND_MADE,
}
PIECES = [1, 1, 5, 1, 17, 1, 1, 26, 2, 1, 1, 1, 40, 3, 1, 1]  # 103 tokens, 4.5 spans


def text(
    length: int, *, batch: int = 2, key_heads: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    heads = (HEADS, key_heads, key_heads)
    made = (torch.randn(batch, h, length, 8, generator=generator) for h in heads)
    query, key, value = (tensor.to(dtype) for tensor in made)
    return query, key, value


def store_for(pattern: P, key: torch.Tensor, value: torch.Tensor, **options: Any) -> spa.BandStore:
    return spa.BandStore(
        pattern,
        key.shape[0],
        key.shape[1],
        key.shape[3],
        value_dim=value.shape[3],
        dtype=key.dtype,
        **options,
    )


def run_pieces(
    store: spa.BandStore, query: Any, key: Any, value: Any, pieces: Any, **options: Any
) -> dict[str, torch.Tensor]:
    outs, lses = [], []
    for q, k, v in zip(*(t.split(pieces, dim=2) for t in (query, key, value))):
        out, lse = spa.band_attention_cached(
            q, store, store.pattern, k, v, return_lse=True, **options
        )
        outs.append(out)
        lses.append(lse)
    return {"out": torch.cat(outs, dim=2), "lse": torch.cat(lses, dim=2)}


def check(case: Case, actual: dict[str, torch.Tensor]) -> None:
    truth, rough = exact(case), plain(case)
    for name in ("out", "lse"):
        check_error(name, actual[name], rough[name], truth[name])


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_pieces_equal_the_whole(name, key_heads):
    pattern = PATTERNS[name]
    tensors = text(sum(PIECES), key_heads=key_heads)
    sinks = torch.linspace(-1, 1, HEADS)
    store = store_for(pattern, *tensors[1:])
    case = Case(*tensors, pattern, {"sinks": sinks, "scale": 0.4})
    check(case, run_pieces(store, *tensors, PIECES, sinks=sinks, scale=0.4))
    assert store.position.tolist() == [sum(PIECES)] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_keeps_the_budget(dtype):
    pattern = PATTERNS["shared_local"]
    tensors = text(60, dtype=dtype)
    sinks = torch.linspace(-1, 1, HEADS).to(dtype)
    actual = run_pieces(
        store_for(pattern, *tensors[1:]), *tensors, [9, 1, 20, *[1] * 30], sinks=sinks
    )
    assert actual["out"].dtype == dtype
    check(Case(*tensors, pattern, {"sinks": sinks}), actual)


@pytest.mark.parametrize("name", ["shared_local", "exclusive", "hand_made"])
def test_rows_start_where_they_are_told(name):
    """Left padding, and padding that is NaN: no key before `key_start` is read."""
    pattern = PATTERNS[name]
    query, key, value = text(sum(PIECES), batch=3)
    start = torch.tensor([0, 6, 30], dtype=torch.int32)
    case = Case(query, key, value, pattern, {"key_start": start})
    wanted, rough = exact(case), plain(case)
    key, value = key.clone(), value.clone()
    for row, first in enumerate(start.tolist()):
        key[row, :, :first], value[row, :, :first] = torch.nan, torch.nan
    actual = run_pieces(store_for(pattern, key, value), query, key, value, PIECES, key_start=start)
    for entry in ("out", "lse"):
        check_error(entry, actual[entry], rough[entry], wanted[entry])


def test_documents_inside_a_row():
    pattern = PATTERNS["shared_local"]
    query, key, value = text(50)
    start = torch.zeros(2, 50, dtype=torch.int32)
    start[0, 20:], start[1, 33:] = 20, 33
    store = store_for(pattern, key, value)
    actual = []
    for at in (slice(0, 11), slice(11, 29), slice(29, 30), slice(30, 50)):
        parts = (t[:, :, at] for t in (query, key, value))
        q, k, v = parts
        actual.append(
            spa.band_attention_cached(q, store, pattern, k, v, key_start=start[:, at].contiguous())
        )
    case = Case(query, key, value, pattern, {"key_start": start})
    check_error("out", torch.cat(actual, dim=2), plain(case)["out"], exact(case)["out"])


def test_queries_follow_keys_within_the_rollback():
    """Queries may follow their keys within the slack."""
    pattern = PATTERNS["shared_local"]
    query, key, value = text(90)
    store = store_for(pattern, key, value, slack=5)
    whole = spa.band_attention(query, key, value, pattern)
    for begin, end in ((0, 60), (60, 61), (61, 67), (67, 73), (73, 78)):
        store.append(key[:, :, begin:end], value[:, :, begin:end])
        some = slice(max(begin, end - 6), end)
        out = spa.band_attention_cached(query[:, :, some], store, pattern)
        torch.testing.assert_close(out, whole[:, :, some], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"`query` must have at most max_rollback \+ 1 = 6 tokens"):
        spa.band_attention_cached(query[:, :, :7], store, pattern)


def test_rollback_leaves_less_room_for_queries():
    """What was taken back leaves less room for queries."""
    pattern = PATTERNS["dense"]
    query, key, value = text(40)
    store = store_for(pattern, key, value, slack=5)
    spa.band_attention_cached(query, store, pattern, key, value)
    store.crop(4)
    with pytest.raises(ValueError, match=r"max_rollback \+ 1 = 6 tokens, less 4 .* got 3"):
        spa.band_attention_cached(query[:, :, 33:36], store, pattern)
    out = spa.band_attention_cached(query[:, :, 34:36], store, pattern)
    whole = spa.band_attention(query[:, :, :36], key[:, :, :36], value[:, :, :36], pattern)
    torch.testing.assert_close(out, whole[:, :, 34:])


def test_new_tokens_are_checked_once(monkeypatch):
    """A step of decoding costs the host time: the store is handed tokens that are checked."""
    checked = []
    monkeypatch.setattr("spattention.cache.check_new_tokens", lambda *given: checked.append(given))
    pattern = P.exclusive(2, 8)
    key = torch.randn(1, 2, 1, 4)
    spa.band_attention_cached(key, spa.BandStore(pattern, 1, 2, 4), pattern, key, key)
    assert len(checked) == 1


def test_no_tokens_change_nothing():
    pattern = PATTERNS["shared_local"]
    tensors = text(40)
    actual = run_pieces(store_for(pattern, *tensors[1:]), *tensors, [0, 30, 0, 1, 0, 9])
    check(Case(*tensors, pattern), actual)


def intervals(far: int) -> st.SearchStrategy[Any]:
    edges = st.lists(st.integers(0, far), max_size=2 * MAX_INTERVALS, unique=True).map(sorted)
    return edges.map(lambda e: tuple(zip(e[::2], e[1::2])))


@settings(max_examples=40, deadline=None)
@given(
    heads=st.lists(intervals(12), min_size=HEADS, max_size=HEADS),
    key_heads=st.sampled_from([1, 2, 4]),
    slack=st.integers(0, 4),
    steps=st.lists(st.tuples(st.integers(1, 15), st.integers(0, 4)), min_size=1, max_size=12),
)
def test_any_pattern_any_steps_forwards_and_back(heads, key_heads, slack, steps):
    """Chunks of any size, each followed by taking a few tokens back."""
    pattern = P(intervals=tuple(heads), span=12)
    query, key, value = text(sum(n for n, _ in steps), key_heads=key_heads)
    store = store_for(pattern, key, value, slack=slack)
    whole = spa.band_attention(query, key, value, pattern, impl="reference")
    at = 0
    for new, back in steps:
        some = slice(at, at + new)
        out = spa.band_attention_cached(
            query[:, :, some], store, pattern, key[:, :, some], value[:, :, some]
        )
        torch.testing.assert_close(out, whole[:, :, some], rtol=0, atol=2e-6)
        back = min(back, slack, new)
        store.crop(back)
        at += new - back
        assert store.position.tolist() == [at, at]


def test_what_is_taken_back_leaves_no_trace():
    pattern = PATTERNS["exclusive"]
    query, key, value = text(70)
    store = store_for(pattern, key, value)
    run_pieces(store, query[:, :, :50], key[:, :, :50], value[:, :, :50], [50])
    wrong = torch.full_like(key[:, :, :16], 99.0)
    store.append(wrong, wrong)
    store.crop(16)
    rest = (t[:, :, 50:] for t in (query, key, value))
    actual = run_pieces(store, *rest, [1] * 20)
    whole = spa.band_attention(query, key, value, pattern)
    torch.testing.assert_close(actual["out"], whole[:, :, 50:], rtol=0, atol=1e-6)


def test_crop_refuses_what_cannot_be_taken_back():
    _, key, value = text(40)
    store = store_for(PATTERNS["dense"], key, value, slack=4)
    store.append(key[:, :, :3], value[:, :, :3])
    with pytest.raises(ValueError, match="`tokens` must be at most the 3 in the store, got 4"):
        store.crop(4)
    store.append(key, value)
    with pytest.raises(ValueError, match="at most the store's `max_rollback` = 4, got 5"):
        store.crop(5)
    store.crop(3)
    with pytest.raises(ValueError, match="got 2 after 3 that were taken back before"):
        store.crop(2)
    store.crop(1)
    store.append(key[:, :, :4], value[:, :, :4])
    store.crop(4)
    with pytest.raises(ValueError, match="`tokens` must not be negative, got -1"):
        store.crop(-1)


def test_rows_are_reordered_selected_and_repeated():
    pattern = PATTERNS["shared_local"]
    query, key, value = text(60, batch=3)
    whole = spa.band_attention(query, key, value, pattern)
    store = store_for(pattern, key, value)
    run_pieces(store, *(t[:, :, :40] for t in (query, key, value)), [40])
    address = store.keys.data_ptr()

    def next_token(at, rows, where):
        q, k, v = (t[rows, :, at : at + 1] for t in (query, key, value))
        out = spa.band_attention_cached(q, where, pattern, k, v)
        torch.testing.assert_close(out, whole[rows, :, at : at + 1], rtol=0, atol=1e-6)

    store.reorder(torch.tensor([2, 0, 0]))
    assert store.keys.data_ptr() == address
    next_token(40, [2, 0, 0], store)
    part = copy.deepcopy(store)
    part.select(torch.tensor([1]))
    part.repeat(2)
    next_token(41, [0, 0], part)
    store.select(torch.tensor([True, False, True]))
    next_token(41, [2, 0], store)
    with pytest.raises(ValueError, match=r"`rows` must be \[B\] = \[2\], got \[3\]"):
        store.reorder(torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match=r"`rows` must be int32 or int64, got torch\.bool"):
        store.reorder(torch.tensor([True] * store.batch_size))
    with pytest.raises(ValueError, match="`times` must be at least 1, got 0"):
        store.repeat(0)


def test_rows_may_hold_texts_of_different_lengths():
    """Positions belong to rows: rows of different stores may be joined."""
    pattern = PATTERNS["shared_local"]
    query, key, value = text(80)
    whole = spa.band_attention(query, key, value, pattern)
    store = store_for(pattern, key, value)
    store.append(key[:, :, :50], value[:, :, :50])
    other = store_for(pattern, key, value)
    other.append(key[:, :, :31], value[:, :, :31])
    store.counts[:, 1] = other.counts[:, 1]
    for name in ("keys", "values"):
        getattr(store, name)[1] = getattr(other, name)[1]
    for new in (1, 1, 7, 1):
        at = store.position.tolist()
        q, k, v = (
            torch.stack([t[row, :, p : p + new] for row, p in enumerate(at)])
            for t in (query, key, value)
        )
        out = spa.band_attention_cached(q, store, pattern, k, v)
        for row, p in enumerate(at):
            torch.testing.assert_close(out[row], whole[row, :, p : p + new], rtol=0, atol=1e-6)


def test_reset_starts_another_text_in_the_same_memory():
    pattern = PATTERNS["hand_made"]
    query, key, value = text(70)
    store = store_for(pattern, key, value)
    store.append(torch.full_like(key, torch.nan), torch.full_like(value, torch.nan))
    address = store.keys.data_ptr()
    store.reset()
    actual = run_pieces(store, query, key, value, [3, *[1] * 67])
    assert store.keys.data_ptr() == address
    check(Case(query, key, value, pattern), actual)


@pytest.mark.parametrize("change", [None, "select", "to"])
def test_what_inference_mode_filled_goes_on_outside_it(change):
    pattern = PATTERNS["shared_local"]
    query, key, value = text(30)
    with torch.inference_mode():
        store = store_for(pattern, key, value)
        store.append(key[:, :, :20], value[:, :, :20])
        if change == "select":
            store.select(torch.arange(2))
        if change == "to":
            store.to("cpu")
    rest = (query[:, :, 20:], store, pattern, key[:, :, 20:], value[:, :, 20:])
    found = spa.band_attention_cached(*rest)
    whole = spa.band_attention(query, key, value, pattern)
    torch.testing.assert_close(found, whole[:, :, 20:])


def test_to_moves_everything():
    _, key, value = text(5)
    store = store_for(PATTERNS["shared_local"], key, value).to("meta")
    assert store.device.type == "meta"
    layout = store.layout
    same = (*layout.by_reach, *layout.by_width)
    tables = (layout, layout.live, *layout.by_length, *same, *(each.rings for each in same))
    tensors = [t for table in tables for t in table if isinstance(t, torch.Tensor)]
    tensors += [t for t in vars(store).values() if isinstance(t, torch.Tensor)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    with pytest.raises(ValueError, match="`key` must have the store's dtype and device"):
        store.append(key, value)


@pytest.mark.parametrize("name", PATTERNS)
def test_one_query_reads_only_its_bands(name, monkeypatch):
    pattern = PATTERNS[name]
    query, key, value = text(60)
    store = store_for(pattern, key, value)
    store.append(key, value)
    read, slots_read = store.gather, []

    def recording(slots):
        slots_read.append(slots.numel())
        return read(slots)

    monkeypatch.setattr(store, "gather", recording)
    spa.band_attention_cached(query[:, :, -1:], store, pattern)
    bands = sum(far - near for head in pattern.intervals for near, far in head)
    assert sum(slots_read) == bands * 2  # two rows


def test_memory_is_that_of_the_reach_and_stays():
    _, key, value = text(100)
    store = store_for(PATTERNS["exclusive"], key, value)
    lengths = ring_lengths(PATTERNS["exclusive"], 2)
    assert lengths == (12 + 32, 23 + 32)
    assert store.nbytes == 2 * 2 * (sum(lengths) + 1) * 8 * 4
    addresses = store.keys.data_ptr(), store.values.data_ptr()
    for _ in range(3):
        store.append(key, value)
    assert (store.keys.data_ptr(), store.values.data_ptr()) == addresses
    assert ring_lengths(HAND_MADE, 4) == (55, 0, 41, 0)
    assert store_for(HAND_MADE, *text(3, key_heads=4)[1:]).keys.shape[1] == 97


def test_the_page_says_how_large_a_store_is():
    page = Path(__file__).parents[1] / "docs" / "generation.md"
    rows = [line.strip("|").split("|") for line in page.read_text("utf-8").splitlines()]
    table = {row[0].strip(): row[1:] for row in rows if len(row) == 4}
    names = {"uniform": "", "geometric": ", geometric", "equal_work": ", equal work"}
    for column, (heads, key_heads) in enumerate(((8, 8), (16, 16), (16, 4))):
        patterns = {
            f"`{kind}`{suffix}": getattr(P, kind)(heads, 4096, widths=widths)
            for kind in ("exclusive", "shared_local")
            for widths, suffix in names.items()
        }
        for kind in ("dense", "gapped", "local_only"):
            patterns[f"`{kind}`"] = getattr(P, kind)(heads, 4096)
        for name, pattern in patterns.items():
            share = sum(ring_lengths(pattern, key_heads)) / (key_heads * 4096)
            assert float(table[name][column]) == pytest.approx(share, abs=6e-4), name


def test_it_compiles_into_one_graph():
    """It compiles into one graph without looking at positions."""
    pattern = PATTERNS["shared_local"]
    query, key, value = text(45)
    store = store_for(pattern, key, value)
    whole = spa.band_attention(query, key, value, pattern)
    run_pieces(store, *(t[:, :, :30] for t in (query, key, value)), [30])
    compilations = []

    def counting(graph, inputs):
        compilations.append(graph)
        return graph.forward

    step = torch.compile(spa.band_attention_cached, fullgraph=True, backend=counting)
    with torch.no_grad():
        for at in range(30, 45):
            q, k, v = (t[:, :, at : at + 1].contiguous() for t in (query, key, value))
            out = step(q, store, pattern, k, v)
            torch.testing.assert_close(out, whole[:, :, at : at + 1], rtol=0, atol=1e-6)
    assert len(compilations) == 1


def test_backward_is_refused():
    query, key, value = text(9)
    store = store_for(PATTERNS["dense"], key, value)
    out = spa.band_attention_cached(query.requires_grad_(), store, store.pattern, key, value)
    with pytest.raises(RuntimeError, match="band_attention_cached has no backward"):
        out.sum().backward()


def test_autocast_casts_as_the_operator_does():
    pattern = PATTERNS["shared_local"]
    query, key, value = text(30)
    store = store_for(pattern, key.bfloat16(), value.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        whole = spa.band_attention(query, key, value, pattern)
        actual = run_pieces(store, query, key, value, [20, *[1] * 10])["out"]
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), whole.float(), rtol=2e-2, atol=2e-2)


def test_errors_name_argument_rule_and_value():
    pattern = PATTERNS["shared_local"]
    query, key, value = text(9)
    store = store_for(pattern, key, value)

    def refused(match, *arguments, **options):
        with pytest.raises(ValueError, match=match):
            spa.band_attention_cached(*arguments, **options)
        assert store.position.tolist() == [0, 0]
        assert not store.keys.any()

    other = PATTERNS["dense"]
    refused(
        "`pattern` must be the store's, .*shared_local.*got .*dense",
        query,
        store,
        other,
        key,
        value,
    )
    refused("`store` must be a BandStore, got list", query, [], pattern, key, value)
    refused("`key` and `value` must be given together, got one", query, store, pattern, key)
    refused(
        r"`key` must have the store's shape .* \[2, 2, n, 8\], got \[1, 2, 9, 8\]",
        *(query[:1], store, pattern, key[:1], value[:1]),
    )
    refused(r"`value` must have .* got \[2, 2, 9, 7\]", query, store, pattern, key, value[..., :7])
    refused("`value` must have as many tokens", query, store, pattern, key, value[:, :, :5])
    refused(
        "`key` must have as many tokens as `query`", query[:, :, :5], store, pattern, key, value
    )
    refused("got torch.float64 on cpu", query, store, pattern, key.double(), value.double())
    refused("query's dtype", query.double(), store, pattern, key, value)
    refused("`sinks` must be", query, store, pattern, key, value, sinks=torch.zeros(3))
    refused(
        "`key_start` must be int32", query, store, pattern, key, value, key_start=torch.zeros(2)
    )
    refused("`pattern` has 4 heads but `query` has 3", query[:, :3], store, pattern, key, value)
    for options, match in (
        ({"num_key_heads": 3}, "`num_key_heads` must divide the pattern's 4 heads, got 3"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"slack": -1}, "`slack` must not be negative, got -1"),
        ({"dtype": torch.int32}, "`dtype` must be floating point, got torch.int32"),
    ):
        with pytest.raises(ValueError, match=match):
            spa.BandStore(
                pattern, **{"batch_size": 1, "num_key_heads": 2, "head_dim": 8, **options}
            )


def test_tables_of_a_store_travel_together(monkeypatch):
    """One copy to the device, and the same numbers, each table where kernels expect it: aligned."""
    pattern = P((((0, 2),), ((3, 7), (9, 12)), (), ((0, 5),)), span=12, prefix=3)
    here = cache_layout.ring_layout(pattern, 2, device=torch.device("cpu"))
    there = cache_layout.ring_layout(pattern, 2, device=torch.device("meta"))
    assert there.offsets.device.type == there.by_width[0].near.device.type == "meta"
    moved = []
    copied = cache_layout._map_tables(here, lambda table: (moved.append(table.clone()), table)[1])
    assert copied == here
    assert len(moved) > 20

    class Elsewhere:
        type = "another"

    sent = []
    to = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, device: (sent.append(device), to(self, "cpu"))[1]
    )
    there = []
    cache_layout._map_tables(
        cache_layout._on_device(here, Elsewhere()), lambda table: (there.append(table), table)[1]
    )
    assert len(sent) == 1
    for table, wanted in zip(there, moved, strict=True):
        assert torch.equal(table, wanted)
        assert table.data_ptr() % 16 == 0
