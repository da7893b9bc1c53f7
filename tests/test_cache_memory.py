"""A BandStore whose memory changes: it grows with the text, and keeps more or less for `crop`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cache import HEADS, PATTERNS, P, intervals, run_pieces, store_for, text

import spattention as spa
from spattention.cache_layout import ring_lengths

close = torch.testing.assert_close


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("capacity", [1, 7, 22])
def test_a_store_grows_with_the_text(name, capacity):
    pattern = PATTERNS[name]
    tensors = text(70, dtype=torch.float64)
    store = store_for(pattern, *tensors[1:], max_rollback=3, capacity=capacity)
    first = store.nbytes
    wanted = spa.band_attention(*tensors, pattern, impl="reference")
    out = run_pieces(store, *tensors, [1, 4, 1, 1, 12, 1, 1, 1, 30, 1, 17])["out"]
    close(out, wanted, rtol=0.0, atol=1e-12)
    assert store.capacity is None
    assert store.layout.ring_lengths == ring_lengths(pattern, 2, max_rollback=3)
    assert store.nbytes >= first
    store.reset()
    close(run_pieces(store, *tensors, [50, 1, 19])["out"], wanted, rtol=0.0, atol=1e-12)


def test_a_span_costs_nothing_until_it_is_used():
    tensors = text(90, dtype=torch.float64)
    wide = P(
        intervals=(((0, 5),), ((0, 2**31 - 1),), ((2, 4), (2**30, 2**31 - 1)), ()), span=2**31 - 1
    )
    same = P(intervals=(((0, 5),), ((0, 90),), ((2, 4),), ()), span=90)
    store = store_for(wide, *tensors[1:], max_rollback=0, capacity=8)
    sizes = []
    for at in range(90):
        query, key, value = (t[:, :, at : at + 1] for t in tensors)
        out = spa.band_attention_cached(query, store, wide, key, value)
        wanted = spa.band_attention(*(t[:, :, : at + 1] for t in tensors), same)
        close(out, wanted[:, :, -1:], rtol=0.0, atol=1e-12)
        sizes.append(store.capacity)
    assert sorted({*sizes}) == [8, 16, 32, 64, 128]
    assert store.layout.ring_lengths == (128, 128)


@settings(max_examples=60, deadline=None)
@given(
    heads=st.lists(intervals(12), min_size=HEADS, max_size=HEADS),
    capacity=st.sampled_from([None, 3]),
    steps=st.lists(
        st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=10
    ),
)
def test_more_or_less_may_be_taken_back_from_now_on(heads, capacity, steps):
    """Chunks, each after another `max_rollback` was set, and followed by a `crop` that the rollback
    allows; what was no longer kept does not come back."""
    pattern = P(intervals=tuple(heads), span=12)
    tensors = text(sum(n for n, _, _ in steps), dtype=torch.float64)
    store = store_for(pattern, *tensors[1:], max_rollback=2, capacity=capacity)
    whole = spa.band_attention(*tensors, pattern, impl="reference")
    at, allowed = 0, 0
    for new, rollback, back in steps:
        store.set_max_rollback(rollback)
        allowed = min(allowed, rollback)
        assert int(store.rolled_back.max()) <= rollback
        query, key, value = (t[:, :, at : at + new] for t in tensors)
        out = spa.band_attention_cached(query, store, pattern, key, value)
        close(out, whole[:, :, at : at + new], rtol=0.0, atol=1e-12)
        at, allowed = at + new, min(allowed + new, rollback)
        if back > allowed:
            with pytest.raises(ValueError, match="`tokens` must be at most the"):
                store.crop(back)
            back = allowed
        store.crop(back)
        at, allowed = at - back, allowed - back
        assert store.position.tolist() == [at, at]


def test_growing_is_refused_in_a_compiled_graph():
    pattern = PATTERNS["shared_local"]
    query, key, value = text(3)
    store = store_for(pattern, key, value, capacity=4)
    torch._dynamo.reset()
    step = torch.compile(spa.band_attention_cached, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="`capacity` must reach as far as the bands"):
        step(query, store, pattern, key, value)
    full = store_for(pattern, key, value, capacity=23)
    assert full.capacity is None
    step(query, full, pattern, key, value)
