"""A BandStore keeps no padding, wherever it is: every sequence has what it has alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cache import HEADS, PATTERNS, P, intervals, store_for, text

import spattention as spa

close = torch.testing.assert_close
EXACT: dict[str, float] = {"rtol": 0.0, "atol": 1e-12}


def alone(
    pattern: P, row: tuple[torch.Tensor, ...], real: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of one sequence's tokens without its padding."""
    query, key, value = (t[:, real][None] for t in row)
    out, lse = spa.band_attention(
        query, key, value, pattern, impl="reference", return_lse=True, **options
    )
    return out[0], lse[0]


def check_rows(
    pattern: P,
    tensors: Any,
    mask: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    **options: Any,
) -> None:
    sinks = options.get("sinks")
    for b, real in enumerate(mask):
        wanted, wanted_lse = alone(pattern, [t[b] for t in tensors], real, **options)
        close(out[b][:, real], wanted, **EXACT)
        close(lse[b][:, real], wanted_lse, **EXACT)
        assert not out[b][:, ~real].any()
        nothing = torch.full((HEADS,), -torch.inf).double() if sinks is None else sinks.double()
        close(lse[b][:, ~real], nothing[:, None].expand(-1, int((~real).sum())), **EXACT)


@settings(max_examples=60, deadline=None)
@given(
    heads=st.lists(intervals(12), min_size=HEADS, max_size=HEADS),
    key_heads=st.sampled_from([1, 2, 4]),
    max_rollback=st.integers(0, 5),
    capacity=st.sampled_from([None, 1, 5]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 1000),
    steps=st.lists(
        st.tuples(st.integers(1, 15), st.integers(0, 5), st.sampled_from([0.0, 0.2, 0.7, 1.0])),
        min_size=1,
        max_size=8,
    ),
)
def test_any_padding_any_steps_forwards_and_back(
    heads, key_heads, max_rollback, capacity, with_sinks, seed, steps
):
    """Chunks with padding in any place, each followed by taking a few columns back."""
    pattern = P(intervals=tuple(heads), span=12)
    tensors = text(sum(n for n, _, _ in steps), batch=3, key_heads=key_heads, dtype=torch.float64)
    sinks = torch.linspace(-1, 1, HEADS, dtype=torch.float64) if with_sinks else None
    store = store_for(pattern, *tensors[1:], max_rollback=max_rollback, capacity=capacity)
    generator = torch.Generator().manual_seed(seed)
    columns: list[int] = []  # of `tensors`, that are in the store
    masks = torch.zeros(3, 0, dtype=torch.bool)
    at = 0
    for new, back, share in steps:
        some = slice(at, at + new)
        mask = torch.rand(3, new, generator=generator) >= share
        masks = torch.cat([masks, mask], dim=1)
        columns += range(at, at + new)
        query, key, value = (t[:, :, some] for t in tensors)
        out, lse = spa.band_attention_cached(
            query,
            store,
            pattern,
            key,
            value,
            sinks=sinks,
            mask=None if mask.all() else mask,
            return_lse=True,
        )
        kept = [t[:, :, columns] for t in tensors]
        for b in range(3):
            wanted, wanted_lse = alone(pattern, [t[b] for t in kept], masks[b], sinks=sinks)
            count = int(mask[b].sum())
            close(out[b][:, mask[b]], wanted[:, wanted.shape[1] - count :], **EXACT)
            close(lse[b][:, mask[b]], wanted_lse[:, wanted.shape[1] - count :], **EXACT)
            assert not out[b][:, ~mask[b]].any()
        back = min(back, max_rollback, new)
        store.crop(back)
        masks = masks[:, : masks.shape[1] - back]
        columns = columns[: len(columns) - back]
        assert store.position.tolist() == masks.sum(dim=1).tolist()
        assert store.columns.tolist() == [len(columns)] * 3
        at += new


@pytest.mark.parametrize("name", PATTERNS)
def test_padding_between_tokens_in_every_pattern(name):
    pattern = PATTERNS[name]
    tensors = text(60, batch=3, dtype=torch.float64)
    mask = torch.rand(3, 60, generator=torch.Generator().manual_seed(1)) > 0.3
    sinks = torch.linspace(-1, 1, HEADS, dtype=torch.float64)
    store = store_for(pattern, *tensors[1:])
    outs, lses = [], []
    for some in torch.arange(60).split([20, 1, 1, 26, 2, 10]):
        parts = (t[:, :, some] for t in tensors)
        query, key, value = parts
        out, lse = spa.band_attention_cached(
            query, store, pattern, key, value, sinks=sinks, mask=mask[:, some], return_lse=True
        )
        outs.append(out)
        lses.append(lse)
    out, lse = torch.cat(outs, dim=2), torch.cat(lses, dim=2)
    check_rows(pattern, tensors, mask, out, lse, sinks=sinks)


def test_what_padding_holds_never_matters():
    pattern = PATTERNS["shared_local"]
    query, key, value = text(50, batch=2, dtype=torch.float64)
    mask = torch.rand(2, 50, generator=torch.Generator().manual_seed(2)) > 0.4
    poisoned = [t.masked_fill(~mask[:, None, :, None], torch.nan) for t in (query, key, value)]
    store = store_for(pattern, key, value)
    outs, lses = [], []
    for some in torch.arange(50).split([17, 1, 22, 1, 9]):
        q, k, v = (t[:, :, some] for t in poisoned)
        out, lse = spa.band_attention_cached(
            q, store, pattern, k, v, mask=mask[:, some], return_lse=True
        )
        outs.append(out)
        lses.append(lse)
    check_rows(pattern, (query, key, value), mask, torch.cat(outs, 2), torch.cat(lses, 2))
    assert store.keys.isfinite().all()


def test_documents_inside_a_row_with_padding():
    """`key_start` counts the tokens that the store kept."""
    pattern = PATTERNS["shared_local"]
    tensors = text(30, batch=2, dtype=torch.float64)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, 4:9], mask[1, 20:22] = False, False
    start = torch.zeros(2, 30, dtype=torch.int32)
    start[0, 12:], start[1, 17:] = 7, 17  # the first token of the second document
    store = store_for(pattern, *tensors[1:])
    outs = []
    for some in torch.arange(30).split([11, 14, 1, 4]):
        query, key, value = (t[:, :, some] for t in tensors)
        given = {"key_start": start[:, some].contiguous(), "mask": mask[:, some]}
        outs.append(spa.band_attention_cached(query, store, pattern, key, value, **given))
    out = torch.cat(outs, dim=2)
    for b, first in enumerate((12, 17)):
        for part in (slice(0, first), slice(first, 30)):
            row = [t[b, :, part] for t in tensors]
            wanted, _ = alone(pattern, row, mask[b, part])
            close(out[b, :, part][:, mask[b, part]], wanted, **EXACT)


def test_padding_moves_with_its_sequence():
    """`reorder`, `select`, `repeat`, copies and `reset`, then `crop` over padding."""
    pattern = PATTERNS["shared_local"]
    _, key, value = text(40, batch=3)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[0, 3:6], mask[2, 6:] = False, False
    store = store_for(pattern, key, value)
    store.append(key[:, :, :20], value[:, :, :20])
    store.append(key[:, :, 20:28], value[:, :, 20:28], mask=mask)
    assert store.position.tolist() == [25, 28, 26]
    store.reorder(torch.tensor([2, 0, 1]))
    other = copy.deepcopy(store)
    other.select(torch.tensor([0, 1]))
    other.repeat(2)
    assert other.position.tolist() == [26, 26, 25, 25]
    other.crop(4)
    assert other.position.tolist() == [24, 24, 23, 23]
    assert other.columns.tolist() == [24] * 4
    store.crop(2)
    assert store.position.tolist() == [26, 23, 26]
    store.crop(1)
    assert store.position.tolist() == [25, 23, 25]
    store.reset()
    store.append(key[:, :, :5], value[:, :, :5])
    store.crop(3)
    assert store.position.tolist() == [2, 2, 2]


def test_padding_compiles_into_one_graph():
    pattern = PATTERNS["shared_local"]
    tensors = text(40, batch=2, dtype=torch.float64)
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(3)) > 0.3
    store = store_for(pattern, *tensors[1:])
    query, key, value = (t[:, :, :30] for t in tensors)
    outs = [spa.band_attention_cached(query, store, pattern, key, value, mask=mask[:, :30])]
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(spa.band_attention_cached, fullgraph=True, backend=counting)
    for at in range(30, 40, 2):
        query, key, value = (t[:, :, at : at + 2].contiguous() for t in tensors)
        some = mask[:, at : at + 2].contiguous()
        outs.append(step(query, store, pattern, key, value, mask=some))
    assert len(graphs) == 1
    out = torch.cat(outs, dim=2)
    for b, real in enumerate(mask):
        wanted, _ = alone(pattern, [t[b] for t in tensors], real)
        close(out[b][:, real], wanted, **EXACT)
