"""Attention over a paged cache: the same as over contiguous keys, whatever the blocks hold."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

import spattention as spa
from spattention.serving.paged import (
    Decodes,
    PagedPrefills,
    Prefills,
    Step,
    attend,
    leading_decodes,
    prefills_of,
    write,
)

HEADS, KV_HEADS, DIM, SPAN = 4, 2, 8, 40
PATTERN = spa.BandPattern((((0, 4), (20, SPAN)), ((0, 13),), (), ((0, 2), (5, 9))), SPAN)
EXACT = {"rtol": 0.0, "atol": 1e-12}


class Engine:
    """A cache in blocks: what every freed and unused block holds is NaN.

    Args:
        lengths: of the requests.
        block_size: tokens of a block.
        window: which blocks are freed; None frees none.
        seed: of everything random.
        pattern: of the layer.
        kernels: what reads the block table; None gathers for all.
    """

    def __init__(
        self,
        lengths: list[int],
        block_size: int,
        window: int | None,
        seed: int,
        pattern: spa.BandPattern = PATTERN,
        kernels: Any = None,
    ) -> None:
        self.pattern, self.kernels = pattern, kernels
        self.dtype = torch.float32 if kernels else torch.float64
        generator = torch.Generator().manual_seed(seed)
        self.shuffle = random.Random(seed)
        self.block_size, self.window = block_size, window
        self.query = [self._tokens(n, HEADS, generator) for n in lengths]
        self.key = [self._tokens(n, KV_HEADS, generator) for n in lengths]
        self.value = [self._tokens(n, KV_HEADS, generator) for n in lengths]
        width = -(-max(lengths) // block_size) + 3
        blocks = 1 + len(lengths) * width
        shape = (blocks, KV_HEADS, block_size, 2 * DIM)
        self.cache = torch.full(shape, torch.nan, dtype=self.dtype)
        self.free = list(range(1, blocks))
        self.shuffle.shuffle(self.free)
        self.table = torch.zeros(len(lengths), width, dtype=torch.int32)
        self.computed = [0] * len(lengths)
        self.copied = 0

    def _tokens(self, length: int, heads: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(length, heads, DIM, generator=generator, dtype=self.dtype)

    def step(self, new_tokens: list[int], sinks: torch.Tensor | None) -> list[torch.Tensor]:
        """Run the next `new_tokens` of each request together."""
        slots = []
        for request, count in enumerate(new_tokens):
            self._release(request)
            for position in range(self.computed[request], self.computed[request] + count):
                column, offset = divmod(position, self.block_size)
                if offset == 0:
                    self.table[request, column] = self.free.pop()
                slots.append(int(self.table[request, column]) * self.block_size + offset)
        parts = [slice(c, c + n) for c, n in zip(self.computed, new_tokens)]
        query, key, value = (
            torch.cat([tokens[part] for tokens, part in zip(all_tokens, parts)])
            for all_tokens in (self.query, self.key, self.value)
        )
        write(key, value, self.cache, torch.tensor(slots))
        lengths = [c + n for c, n in zip(self.computed, new_tokens)]
        offsets = [sum(new_tokens[:i]) for i in range(len(new_tokens) + 1)]
        count = leading_decodes(offsets) if self.kernels else 0
        decodes = None
        if count:
            seq_lens = torch.tensor(lengths[:count], dtype=torch.int32)
            decodes = Decodes(self.table[:count], seq_lens)
        prefills = self._prefills(offsets[count:], lengths[count:], self.table[count:])
        out = torch.full_like(query, torch.nan)
        attend(
            query,
            self.cache,
            Step(decodes, prefills),
            self.pattern,
            out,
            scale=0.5,
            sinks=sinks,
            kernels=self.kernels,
        )
        self.computed = lengths
        return list(out.split(new_tokens))

    def _prefills(
        self, offsets: list[int], lengths: list[int], table: torch.Tensor
    ) -> PagedPrefills | Prefills | None:
        if self.kernels is None:
            window, prefix = self.window, self.pattern.prefix
            return prefills_of(offsets, lengths, table, self.block_size, window, prefix)
        first, last = offsets[0], offsets[-1]
        starts, held = (torch.tensor(each, dtype=torch.int32) for each in (offsets, lengths))
        if first == last:
            return None

        def copies() -> Prefills | None:
            self.copied += 1
            return prefills_of(offsets, lengths, table, self.block_size, self.window)

        return PagedPrefills(first, last, starts - first, table, held, max(lengths), copies)

    def _release(self, request: int) -> None:
        """As vLLM's manager of sliding windows does, before a step."""
        if self.window is None:
            return
        skipped = max(0, self.computed[request] - self.window + 1)
        first = -(-self.pattern.prefix // self.block_size)
        for column in range(first, skipped // self.block_size):
            block = int(self.table[request, column])
            if block:
                self.cache[block] = torch.nan
                self.free.insert(0, block)
                self.table[request, column] = 0

    def expected(self, request: int, sinks: torch.Tensor | None) -> torch.Tensor:
        whole = (tokens[request].transpose(0, 1)[None] for tokens in self._all())
        out = spa.band_attention(*whole, self.pattern, scale=0.5, sinks=sinks, impl="reference")
        return out[0].transpose(0, 1)

    def _all(self) -> tuple[list[torch.Tensor], ...]:
        return self.query, self.key, self.value


@pytest.mark.parametrize("window", [None, SPAN, SPAN + 7])
@pytest.mark.parametrize("block_size", [1, 5, 16])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.3, -1.0, 2.0, 0.0]).double()])
def test_paged_steps_equal_one_pass(
    block_size: int, window: int | None, sinks: torch.Tensor | None
) -> None:
    """Mixed steps of prefill chunks and decoding give each request what one pass over it gives,
    while blocks behind the window are freed and poisoned."""
    _run_and_compare(Engine([97, 1, 60, 33], block_size, window, seed=block_size), sinks, EXACT)


@pytest.mark.parametrize("block_size", [1, 5, 16])
@pytest.mark.parametrize("prefix", [1, 6, 16, SPAN])
def test_prefixes_outlive_the_window(block_size: int, prefix: int) -> None:
    """The first blocks are kept, and read besides those in the window, while others are freed."""
    engine = Engine([97, 3, 60], block_size, SPAN, 1, replace(PATTERN, prefix=prefix))
    _run_and_compare(engine, None, EXACT)


@pytest.mark.parametrize("block_size", [1, 5, 16])
@pytest.mark.parametrize("prefix", [0, 6])
def test_kernels_read_the_block_table(prefix: int, block_size: int) -> None:
    """Steps that mix decoding and chunks of prompts, while freed blocks are poisoned."""
    kernels = pytest.importorskip("spattention.impl.triton")
    engine = Engine([70, 1, 33], block_size, SPAN, 0, replace(PATTERN, prefix=prefix), kernels)
    sinks = torch.tensor([0.3, -1.0, 2.0, 0.0])
    _run_and_compare(engine, sinks, {"rtol": 1e-5, "atol": 1e-5})


def test_dense_heads_of_long_chunks_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernels prefer copies; the result is that of reading in place."""
    kernels = pytest.importorskip("spattention.impl.triton")
    engines = [Engine([60, 33], 16, None, 0, kernels=kernels) for _ in range(2)]
    found: list[list[torch.Tensor]] = []
    for engine, few in zip(engines, (3500, 5)):
        monkeypatch.setattr(kernels, "MAX_READS_IN_PLACE", few)
        engine.copied = 0
        found.append(engine.step([60, 33], None))
        assert engine.copied == (few == 5)
    for in_place, gathered in zip(*found):
        torch.testing.assert_close(in_place, gathered, rtol=1e-5, atol=1e-5)


def test_pages_that_are_not_contiguous_are_refused() -> None:
    """Kernels would read other numbers in silence."""
    kernels = pytest.importorskip("spattention.impl.triton")
    query, pattern = torch.zeros(1, 1, 8), spa.BandPattern((((0, 1),),), 1)
    pages, number = torch.zeros(1, 16, 1, 16), torch.ones(1, dtype=torch.int32)
    requests = torch.tensor([0, 1], dtype=torch.int32), number[None] - 1, number, 1
    for key, value in ((pages[..., ::2], pages[..., :8]), (pages[..., :8], pages[..., ::2])):
        with pytest.raises(AssertionError):
            kernels.attend_paged_documents(
                query, key, value, *requests, pattern, scale=1.0, sinks=None, out=query.clone()
            )


@pytest.mark.parametrize("decodes", [1, 2, 3, 4])
def test_tables_behind_decodes_are_aligned(decodes: int) -> None:
    """How many requests are decoded first does not select another compiled form of the kernels."""
    starts, lengths = torch.arange(2 * 8, dtype=torch.int32).view(2, 8)
    table = torch.arange(8 * 5, dtype=torch.int32).view(8, 5)
    given = starts[decodes:], table[decodes:], lengths[decodes:]
    found = PagedPrefills(decodes, 8, *given, 15)
    for mine, each in zip((found.cu_seqlens_q, found.block_table, found.seq_lens), given):
        assert mine.data_ptr() % 16 == 0
        assert mine.equal(each)
    assert decodes < 4 or found.seq_lens is given[2]  # nothing is copied without need


def test_leading_decodes_have_one_new_token() -> None:
    """Requests without new tokens end them, as those with several do."""
    assert leading_decodes([0, 1, 2, 3]) == 3
    assert leading_decodes([0, 1, 2, 9]) == 2
    assert leading_decodes([0, 1, 1, 2]) == 1
    assert leading_decodes([0, 5]) == 0


def _run_and_compare(
    engine: Engine, sinks: torch.Tensor | None, tolerance: dict[str, float]
) -> None:
    """All tokens of all requests, in random steps."""
    lengths = [len(tokens) for tokens in engine.query]
    results: list[list[torch.Tensor]] = [[] for _ in lengths]
    while any(n < length for n, length in zip(engine.computed, lengths)):
        chunks = [
            min(engine.shuffle.choice([0, 1, 1, 17]), length - n)
            for n, length in zip(engine.computed, lengths)
        ]
        for result, part in zip(results, engine.step(chunks, sinks)):
            result.append(part)
    for request, result in enumerate(results):
        torch.testing.assert_close(
            torch.cat(result),
            engine.expected(request, sinks),
            **tolerance,
            msg=f"request {request}",
        )


def test_a_window_of_the_farthest_edge_is_needed() -> None:
    """A window of one token less loses a key that a band still reads."""
    lengths = [SPAN + 20]
    for window, same in ((SPAN, True), (SPAN - 1, False)):
        engine = Engine(lengths, 1, window, seed=0)
        out = torch.cat([engine.step([1], None)[0] for _ in range(lengths[0])])
        assert out.allclose(engine.expected(0, None), **EXACT) == same


def test_only_readable_keys_are_gathered() -> None:
    """Decoding gathers the window and the prefix, not the whole request."""
    table = torch.arange(1000, dtype=torch.int32)[None]
    found = prefills_of([3, 4], [10_001], table, 16, 100, prefix=2)
    assert found is not None
    assert (found.first, found.last, found.max_seqlen_k) == (3, 4, 102)
    tokens = found.blocks * 16 + found.places
    assert tokens.tolist() == [0, 1, *range(9_901, 10_001)]


def test_requests_without_new_tokens_are_no_documents() -> None:
    """Their keys are not gathered either."""
    table = torch.arange(20, dtype=torch.int32).view(2, 10)
    found = prefills_of([0, 0, 3], [5, 3], table, 16, None)
    assert found is not None
    assert found.cu_seqlens_q.tolist() == found.cu_seqlens_k.tolist() == [0, 3]
    assert found.blocks.tolist() == [10, 10, 10]
    assert prefills_of([2, 2], [5], table, 16, None) is None


def test_padding_tokens_are_written_to_the_unused_slot() -> None:
    """Tokens that only pad a batch, with negative slots, touch no request's block."""
    cache = torch.zeros(3, 1, 2, 4)
    token = torch.ones(2, 1, 2)
    write(token, token, cache, torch.tensor([3, -1]))
    assert cache[1, 0, 1].eq(1).all()
    assert cache[0, 0, 0].eq(1).all()
    assert cache.sum() == 8
