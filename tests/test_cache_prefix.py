"""A store with a prefix: the first tokens of a document, kept outside the rings."""

from __future__ import annotations

import pytest
import torch
from random_stores import Life, RingKernels, check

import spattention as spa
from spattention import cache, cache_prefix, cached_attention
from spattention.attention import HAS_TRITON

P = spa.BandPattern
SPAN, PREFIX = 12, 3
PATTERN = P((((0, 2),), ((3, 7),), (), ()), span=SPAN, prefix=PREFIX)


def text(length: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    query, key, value = (
        torch.randn(batch, h, length, 8, generator=generator, dtype=torch.float64)
        for h in (4, 2, 2)
    )
    return query, key, value


def new_store(pattern: P = PATTERN, batch: int = 2, **options: int) -> spa.BandStore:
    return spa.BandStore(pattern, batch, 2, 8, dtype=torch.float64, **options)


@pytest.mark.parametrize("first", range(0, 200, 25))
def test_random_lives_of_a_store(first: int) -> None:
    """Any chunks, padding, documents, `crop`, moves and growth: as over the whole text."""
    for seed in range(first, first + 25):
        check(seed)


def test_rings_by_a_kernel_and_prefix_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels read the rings alone; the prefix joins by log-sum-exp, each token once."""
    for module in (cache, cached_attention):
        monkeypatch.setattr(module, "kernels_for", lambda *given: RingKernels)
    for seed in range(60):
        life = Life(seed)
        for _ in range(4):
            life.step()
            life.change()


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_decoding_kernels_and_prefix_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with the Triton kernels, in the interpreter."""
    from spattention.impl import triton
    from spattention.impl.triton import op

    if not op.INTERPRETED:
        pytest.skip("the kernels run on the GPU here")
    calls = []
    attend = triton.attend_rings
    monkeypatch.setattr(
        triton, "attend_rings", lambda *given, **more: (calls.append(1), attend(*given, **more))[1]
    )
    for module in (cache, cached_attention):
        monkeypatch.setattr(module, "kernels_for", lambda *given: triton)
    for seed in range(12):
        life = Life(seed, torch.float32)
        for _ in range(3):
            life.step()
            life.change()
    assert len(calls) > 10


def test_first_tokens_stay_for_good() -> None:
    """Long after the rings have dropped them, and they are not read from the rings."""
    query, key, value = text(80)
    whole = spa.band_attention(query, key, value, PATTERN)
    store = new_store(max_rollback=1)
    for at in range(80):
        now = slice(at, at + 1)
        out = spa.band_attention_cached(
            query[:, :, now], store, PATTERN, key[:, :, now], value[:, :, now]
        )
        torch.testing.assert_close(out, whole[:, :, now])
    bare = P(PATTERN.intervals, SPAN)
    without = spa.band_attention(query, key, value, bare)[:, :, -1:]
    assert (out - without)[:, :2].abs().min() > 1e-6


def test_a_new_document_takes_the_prefix_over() -> None:
    query, key, value = text(40, batch=1)
    start = torch.zeros(1, 40, dtype=torch.int32)
    start[:, 21:] = 21
    whole = spa.band_attention(query, key, value, PATTERN, key_start=start)
    store = new_store(batch=1, max_rollback=2)
    for at in range(40):
        now = slice(at, at + 1)
        parts = (t[:, :, now] for t in (query, key, value))
        q, k, v = parts
        out = spa.band_attention_cached(q, store, PATTERN, k, v, key_start=start[:, now])
        torch.testing.assert_close(out, whole[:, :, now])


def test_crop_brings_back_the_document_before() -> None:
    """A draft that opened a document is taken back: the former prefix is there again."""
    query, key, value = text(30, batch=1)
    whole = spa.band_attention(query, key, value, PATTERN)
    store = new_store(batch=1, max_rollback=4)
    store.append(key[:, :, :20], value[:, :, :20])
    wrong = torch.full_like(key[:, :, :4], 99.0)
    store.append(wrong, wrong, key_start=torch.tensor([[20, 21, 21, 23]], dtype=torch.int32))
    store.crop(4)
    for at in range(20, 30):
        now = slice(at, at + 1)
        q, k, v = (t[:, :, now] for t in (query, key, value))
        out = spa.band_attention_cached(q, store, PATTERN, k, v)
        torch.testing.assert_close(out, whole[:, :, now])


def test_tokens_before_the_start_are_never_read() -> None:
    """Left padding may be NaN, in the rings and in the prefix."""
    query, key, value = text(30)
    start = torch.tensor([0, 9], dtype=torch.int32)
    whole = spa.band_attention(query, key, value, PATTERN, key_start=start)
    key[1, :, :9], value[1, :, :9] = torch.nan, torch.nan
    store = new_store()
    for now in (slice(0, 4), slice(4, 25), slice(25, 26), slice(26, 30)):
        q, k, v = (t[:, :, now] for t in (query, key, value))
        out = spa.band_attention_cached(q, store, PATTERN, k, v, key_start=start)
        torch.testing.assert_close(out, whole[:, :, now])


def test_one_query_reads_bands_and_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = text(60)
    store = new_store()
    store.append(key, value)
    read, slots_read = store.gather, []

    def recording(slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        slots_read.append(slots.numel())
        return read(slots)

    monkeypatch.setattr(store, "gather", recording)
    spa.band_attention_cached(query[:, :, -1:], store, PATTERN)
    assert sum(slots_read) == 2 * (2 + PREFIX + 4 + PREFIX)


def test_memory_has_the_prefix_of_heads_that_attend() -> None:
    bare, kept = new_store(P(PATTERN.intervals, SPAN)), new_store()
    assert kept.nbytes - bare.nbytes == 2 * 2 * PREFIX * 8 * 8  # one of two key heads has a ring
    small = new_store(P.exclusive(4, 5000, prefix=5000), capacity=10)
    assert small.keys.shape[1] == 2 * (10 + 32 + 10) + 1


def test_a_band_beyond_the_capacity_keeps_its_prefix() -> None:
    """Of a head that reaches no token yet, the prefix is all it sees."""
    pattern = P((((20, 30),),) * 4, span=30, prefix=PREFIX)
    query, key, value = text(40)
    whole = spa.band_attention(query, key, value, pattern)
    store = new_store(pattern, capacity=4)
    for now in (slice(0, 3), slice(3, 4), slice(4, 5), slice(5, 15), slice(15, 40)):
        q, k, v = (t[:, :, now] for t in (query, key, value))
        out = spa.band_attention_cached(q, store, pattern, k, v)
        torch.testing.assert_close(out, whole[:, :, now])


@pytest.mark.parametrize("patterns", [[PATTERN], [P.exclusive(4, 9), PATTERN, P.dense(4, 7)]])
def test_each_pattern_compiles_into_one_graph(patterns: list[P]) -> None:
    """Spans and prefixes that differ between calls are no variables of a graph."""
    torch._dynamo.reset()
    for pattern in patterns:
        check_compiled(pattern)


def check_compiled(pattern: P) -> None:
    query, key, value = text(24)
    whole = spa.band_attention(query, key, value, pattern)
    store = new_store(pattern)
    store.append(key[:, :, :16], value[:, :, :16])
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(spa.band_attention_cached, fullgraph=True, backend=counting)
    with torch.no_grad():
        for at in range(16, 24):
            q, k, v = (t[:, :, at : at + 1].contiguous() for t in (query, key, value))
            torch.testing.assert_close(step(q, store, pattern, k, v), whole[:, :, at : at + 1])
    assert len(graphs) == 1


def test_a_start_that_was_dropped_is_refused() -> None:
    """The first tokens of another document are gone, so that nothing may claim them."""
    query, key, value = text(30)
    store = new_store()
    store.append(key[:, :, :20], value[:, :, :20])
    start = torch.tensor([0, 7], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"`key_start` must stay, or move to a new .*got 7 "):
        store.append(key[:, :, 20:], value[:, :, 20:], key_start=start)
    with pytest.raises(ValueError, match=r"`key_start` must stay, .*got 7 after 0 in row 1"):
        spa.band_attention_cached(
            query[:, :, 20:], store, PATTERN, key[:, :, 20:], value[:, :, 20:], key_start=start
        )
    with pytest.raises(ValueError, match=r"must be the one that .*got \[7\] for \[0\] in row 1"):
        spa.band_attention_cached(query[:, :, :1], store, PATTERN, key_start=start)
    with pytest.raises(ValueError, match=r"`key_start` must be \[B\] = \[2\] or \[B, Q\]"):
        store.append(key[:, :, 20:], value[:, :, 20:], key_start=start[:1])
    assert store.position.tolist() == [20, 20]


def test_a_full_prefix_is_not_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding costs nothing for it, and another text or a `crop` into it writes it anew."""
    query, key, value = text(12)
    written = []
    write = cache_prefix.hold_next
    monkeypatch.setattr(
        cache_prefix, "hold_next", lambda *given: (written.append(1), write(*given))
    )
    store = new_store()

    def run(start: int, stop: int) -> None:
        whole = spa.band_attention(query, key, value, PATTERN)
        for at in range(start, stop):
            now = slice(at, at + 1)
            q, k, v = (t[:, :, now] for t in (query, key, value))
            out = spa.band_attention_cached(q, store, PATTERN, k, v)
            torch.testing.assert_close(out, whole[:, :, now])

    run(0, 10)
    assert len(written) == PREFIX
    store.crop(9)
    query, key, value = (torch.cat([t[:, :, :1], t[:, :, 1:] + 1], 2) for t in (query, key, value))
    run(1, 12)
    assert len(written) == 2 * PREFIX - 1
    store.reset()
    run(0, 5)
    assert len(written) == 3 * PREFIX - 1


def test_a_step_of_a_graph_writes_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded step keeps its own token at most, wherever it is replayed; it copies no prefix."""
    query, key, value = text(40)
    whole = spa.band_attention(query, key, value, PATTERN)
    monkeypatch.setattr(cache, "in_graph", lambda tensor: True)
    monkeypatch.delattr(cache_prefix, "_fill")
    store = new_store(max_rollback=1)
    taken = []
    for at in range(40):
        now = slice(at, at + 1)
        taken.append(
            spa.band_attention_cached(
                query[:, :, now], store, PATTERN, key[:, :, now], value[:, :, now]
            )
        )
    torch.testing.assert_close(torch.cat(taken, dim=2), whole)


def test_padded_steps_stop_copying_the_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps with a mask count their tokens too, the fewest of a sequence, and never padding."""
    query, key, value = text(12)
    store = new_store()
    held = []
    fill = cache_prefix._fill
    monkeypatch.setattr(cache_prefix, "_fill", lambda *given: (held.append(1), fill(*given)))
    for at in range(12):
        now = slice(at, at + 1)
        mask = torch.tensor([[True], [at % 2 == 1]])
        spa.band_attention_cached(
            query[:, :, now], store, PATTERN, key[:, :, now], value[:, :, now], mask=mask
        )
    assert len(held) == 2 * PREFIX


def test_a_first_pass_copies_the_prefix_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an empty store nothing is read: the first keys go where they stay."""
    query, key, value = text(20)
    whole = spa.band_attention(query, key, value, PATTERN)
    monkeypatch.delattr(cache_prefix, "_fill")
    store = new_store()
    first = [t[:, :, :PREFIX] for t in (query, key, value)]
    spa.band_attention_cached(first[0], store, PATTERN, *first[1:])
    rest = [t[:, :, PREFIX:] for t in (query, key, value)]
    out = spa.band_attention_cached(rest[0], store, PATTERN, *rest[1:])
    torch.testing.assert_close(out, whole[:, :, PREFIX:])
