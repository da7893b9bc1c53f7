"""SGLang's back end over its pool of slots: each step equals one pass over the request's tokens."""

from __future__ import annotations

import random
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import spattention as spa

from .fake_sglang import (
    ForwardBatch,
    ForwardMode,
    MHATokenToKVPool,
    RadixAttention,
    ReqToTokenPool,
    SWAKVPool,
    install,
)

HEADS, KV_HEADS, DIM, SPAN = 4, 2, 8, 40
P = spa.BandPattern
PATTERN = P((((0, 4), (20, SPAN)), ((0, 13),), (), ((0, 2), (5, 9))), SPAN)
PREFIXED = replace(PATTERN, prefix=6)
SINKS = torch.tensor([0.3, -1.0, 2.0, 0.0])
EXACT = {"rtol": 0.0, "atol": 1e-12}


@pytest.fixture
def backend_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    install(monkeypatch)
    return import_module("spattention.serving.sglang_backend")


class Runner:
    """SGLang's side: a table and a pool of slots. Slots that nobody reaches are overwritten with
    NaN.

    Args:
        backend_module: `serving.sglang_backend`.
        layers: the attention layers, with their bands.
        lengths: tokens of the requests, all of which are known from the start.
        shared: how many first tokens every request but the first takes from the first one's slots.
    """

    def __init__(
        self,
        backend_module: Any,
        layers: list[RadixAttention],
        lengths: list[int],
        *,
        page_size: int = 1,
        shared: int = 0,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ) -> None:
        self.layers, self.shared, self.page_size = layers, shared, page_size
        self.model_config = SimpleNamespace(dtype=dtype)
        self.shuffle = random.Random(seed)
        self.answers: dict[tuple[int, int], Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        count = len(layers)

        def tokens(length: int, heads: int) -> Tensor:
            return torch.randn(count, length, heads, DIM, generator=generator, dtype=dtype)

        self.query = [tokens(length, HEADS) for length in lengths]
        self.key = [tokens(length, KV_HEADS) for length in lengths]
        self.value = [tokens(length, KV_HEADS) for length in lengths]
        for texts in (self.key, self.value):
            for text in texts[1:]:
                text[:, :shared] = texts[0][:, :shared]
        width = max(lengths) + 5
        pages = -(-width // page_size) * len(lengths)
        size = pages * page_size
        pool = MHATokenToKVPool(size, page_size, dtype, KV_HEADS, DIM, count)
        pool.k_buffer[:, :page_size] = pool.v_buffer[:, :page_size] = 0  # the slots kept free
        self.pool = pool
        # Row 0 belongs to nobody.
        self.req_to_token = torch.zeros(len(lengths) + 1, width, dtype=torch.int32)
        self.req_to_token_pool = ReqToTokenPool(self.req_to_token)
        self.token_to_kv_pool = pool
        self.rows = list(range(1, len(lengths) + 1))
        self.shuffle.shuffle(self.rows)
        free = list(range(1, pages + 1))
        self.shuffle.shuffle(free)
        for request, length in enumerate(lengths):
            for position in range(length):
                offset = position % page_size
                if request and position < shared:
                    slot = int(self.req_to_token[self.rows[0], position])
                elif offset == 0:
                    slot = free.pop() * page_size
                else:
                    slot = int(self.req_to_token[self.rows[request], position - 1]) + 1
                self.req_to_token[self.rows[request], position] = slot
        self.computed = [0] * len(lengths)
        self.backend = backend_module.create(self)

    def batch(self, requests: list[int], new: list[int], mode: ForwardMode) -> ForwardBatch:
        rows = torch.tensor([self.rows[r] for r in requests])
        prefixes = [self.computed[r] for r in requests]
        lengths = torch.tensor([p + n for p, n in zip(prefixes, new)])
        slots = [
            self.req_to_token[self.rows[r], p : p + n] for r, p, n in zip(requests, prefixes, new)
        ]
        batch = ForwardBatch(mode, len(requests), rows, lengths, lengths, torch.cat(slots).long())
        if mode != ForwardMode.DECODE:
            batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu = prefixes, new
        return batch

    def step(self, requests: list[int], new: list[int], mode: ForwardMode) -> None:
        """Run the next tokens of these requests, and compare what each layer gives."""
        batch = self.batch(requests, new, mode)
        self.backend.init_forward_metadata(batch)
        self.compare(requests, new, batch)

    def compare(self, requests: list[int], new: list[int], batch: ForwardBatch) -> None:
        parts = [slice(self.computed[r], self.computed[r] + n) for r, n in zip(requests, new)]
        for index, layer in enumerate(self.layers):
            query, key, value = (
                torch.cat([texts[r][index, part] for r, part in zip(requests, parts)])
                for texts in (self.query, self.key, self.value)
            )
            out = self.backend.forward(query.flatten(1), key, value, layer, batch)
            assert out.shape == (sum(new), HEADS * DIM)
            wanted = [self.expected(index, r)[part] for r, part in zip(requests, parts)]
            tolerance = EXACT if out.dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
            torch.testing.assert_close(
                out.double(), torch.cat(wanted).flatten(1), msg=f"layer {index}", **tolerance
            )
        for request, count in zip(requests, new):
            self.computed[request] += count
        self.poison()

    def expected(self, index: int, request: int) -> Tensor:
        if (index, request) not in self.answers:
            self.answers[index, request] = self._expected(index, request)
        return self.answers[index, request]

    def _expected(self, index: int, request: int) -> Tensor:
        whole = (
            texts[request][index].double().transpose(0, 1)[None]
            for texts in (self.query, self.key, self.value)
        )
        bands = self.backend._bands(self.layers[index])
        sinks = None if bands.sinks is None else bands.sinks.double()
        out = spa.band_attention(*whole, bands.pattern, scale=0.5, sinks=sinks, impl="reference")
        assert isinstance(out, Tensor)
        return out[0].transpose(0, 1)

    def poison(self) -> None:
        """Overwrite what no later token of any request can read."""
        for index, layer in enumerate(self.layers):
            pattern = self.backend._bands(layer).pattern
            reach = max((head[-1][1] for head in pattern.intervals if head), default=1)
            read, used = {0}, {0}
            for row, computed in zip(self.rows, self.computed):
                first = self.req_to_token[row, : pattern.prefix].tolist()
                last = self.req_to_token[row, max(0, computed - reach + 1) : computed].tolist()
                read |= {*first, *last}
            used = {
                int(s) for r, c in zip(self.rows, self.computed) for s in self.req_to_token[r, :c]
            }
            unread = sorted(used - read)
            self.pool.k_buffer[index, unread] = self.pool.v_buffer[index, unread] = torch.nan


def layer(pattern: P | None, index: int = 0, sinks: Any = None) -> RadixAttention:
    made: Any = RadixAttention(HEADS, DIM, 0.5, KV_HEADS, index)
    if pattern is not None:
        module = import_module("spattention.serving.sglang_backend")
        made.bands = module.LayerBands(pattern, sinks)
    return made


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("pattern", [PATTERN, PREFIXED, replace(PATTERN, prefix=SPAN)])
@pytest.mark.parametrize("sinks", [None, SINKS])
def test_steps_equal_one_pass(
    backend_module: Any, page_size: int, pattern: P, sinks: Tensor | None
) -> None:
    """Extending by chunks, mixed steps and decoding, while slots out of reach hold NaN."""
    sinks = None if sinks is None else sinks.double()
    layers = [layer(pattern, sinks=sinks), layer(PATTERN, 1)]
    runner = Runner(backend_module, layers, [97, 1, 60, 33], page_size=page_size)
    runner.step([0, 1, 2], [50, 1, 9], ForwardMode.EXTEND)
    runner.step([0, 2], [17, 1], ForwardMode.MIXED)
    runner.step([2, 0], [1, 1], ForwardMode.DECODE)
    runner.step([3, 0, 2], [33, 1, 30], ForwardMode.MIXED)
    while runner.computed[0] < 97:
        requests = [r for r in (0, 2) if runner.computed[r] < len(runner.query[r][0])]
        runner.step(requests, [1] * len(requests), ForwardMode.DECODE)


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("pattern", [PATTERN, PREFIXED])
def test_kernels_extend_in_place(
    backend_module: Any, page_size: int, pattern: P, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New tokens are read through the pages, while slots out of reach hold NaN."""
    kernels = pytest.importorskip("spattention.impl.triton")
    slots = import_module("spattention.serving.slots")
    monkeypatch.setattr(slots, "page_kernels", lambda *facts: kernels)
    monkeypatch.setattr(slots.NewTokens, "keys", lambda *facts: pytest.fail("gathered"))
    options: dict[str, Any] = {"page_size": page_size, "dtype": torch.float32}
    layers = [layer(pattern, sinks=SINKS), layer(PATTERN, 1)]
    runner = Runner(backend_module, layers, [80, 1, 33], **options)
    runner.step([0, 1, 2], [50, 1, 9], ForwardMode.EXTEND)
    runner.step([0, 2], [17, 1], ForwardMode.MIXED)
    runner.step([2, 0], [23, 13], ForwardMode.EXTEND)


@pytest.mark.parametrize("pattern", [PATTERN, PREFIXED])
def test_cached_prefixes_are_shared(backend_module: Any, pattern: P) -> None:
    """Requests start from the slots of another one, as SGLang's radix cache gives them."""
    runner = Runner(backend_module, [layer(pattern)], [70, 60, 55], shared=52)
    runner.poison = lambda: None  # type: ignore[method-assign]
    runner.step([0], [70], ForwardMode.EXTEND)
    runner.computed[1] = runner.computed[2] = 52
    runner.step([1, 2], [8, 3], ForwardMode.EXTEND)


def test_layers_without_a_pattern_are_dense(backend_module: Any) -> None:
    runner = Runner(backend_module, [layer(None), layer(PATTERN, 1)], [50, 20])
    runner.step([0, 1], [30, 18], ForwardMode.EXTEND)
    runner.step([0, 1], [1, 1], ForwardMode.DECODE)
    assert runner.backend._bands(runner.layers[0]).pattern == P.dense(HEADS, 55)


@pytest.mark.parametrize("page_size", [1, 4])
def test_graphs_follow_the_engine(backend_module: Any, page_size: int, monkeypatch: Any) -> None:
    """A captured step reads again what the engine wrote into its tables since."""
    runner = Runner(backend_module, [layer(PREFIXED)], [60, 30], page_size=page_size)
    backend = runner.backend
    monkeypatch.setattr(backend_module, "check_kernels", lambda pool: None)
    backend.init_cuda_graph_state(3, 3)
    static = ForwardBatch(
        ForwardMode.DECODE,
        3,
        torch.zeros(3, dtype=torch.int64),
        torch.full((3,), backend.get_cuda_graph_seq_len_fill_value()),
        torch.ones(3, dtype=torch.int64),
        torch.zeros(3, dtype=torch.int64),
    )
    backend.init_forward_metadata_out_graph(static, in_capture=True)
    backend.init_forward_metadata_in_graph(static)
    captured = backend.forward_metadata
    zeros = torch.zeros(3, KV_HEADS, DIM, dtype=torch.float64)
    query = torch.zeros(3, HEADS * DIM, dtype=torch.float64)
    assert backend.forward(query, zeros, zeros, runner.layers[0], static).isfinite().all()
    runner.step([0, 1], [50, 29], ForwardMode.EXTEND)
    batch = runner.batch([1, 0], [1, 1], ForwardMode.DECODE)
    for name in ("req_pool_indices", "seq_lens", "out_cache_loc"):
        getattr(static, name)[:2] = getattr(batch, name)
    backend.init_forward_metadata_out_graph(static)
    backend.init_forward_metadata_in_graph(static)
    assert backend.forward_metadata.block_table.data_ptr() == captured.block_table.data_ptr()
    assert captured.seq_lens.tolist() == [30, 51, 1]
    query, key, value = (
        torch.cat([texts[1][0, 29:30], texts[0][0, 50:51], texts[0][0, :1]])
        for texts in (runner.query, runner.key, runner.value)
    )
    out = backend.forward(query.flatten(1), key, value, runner.layers[0], static)[:2]
    wanted = torch.cat([runner.expected(0, 1)[29:30], runner.expected(0, 0)[50:51]])
    torch.testing.assert_close(out, wanted.flatten(1), **EXACT)


def test_only_reachable_keys_are_gathered(backend_module: Any) -> None:
    """A chunk reads the bands' reach and the prefix, not the whole request."""
    slots = import_module("spattention.serving.slots")
    table = torch.arange(3 * 1000, dtype=torch.int32).view(3, 1000)
    tokens = slots.NewTokens(table, [900, 0, 3], [10, 5, 0])
    keys = tokens.keys(PREFIXED)
    first = [*range(6), *range(900 - SPAN + 1, 910)]
    assert keys.blocks.tolist() == [*first, *range(1000, 1005)]
    assert keys.cu_seqlens_k.tolist() == [0, 55, 60]
    assert keys.cu_seqlens_q.tolist() == [0, 10, 15]
    assert tokens.keys(replace(PREFIXED, intervals=((), ((0, SPAN),), (), ()))) is keys


@pytest.mark.parametrize("new", [[], [0, 0]])
def test_a_step_without_new_tokens_is_zero(backend_module: Any, new: list[int]) -> None:
    """Rows that only pad, of no requests or of requests without new tokens."""
    slots = import_module("spattention.serving.slots")
    tokens = slots.NewTokens(torch.zeros(len(new), 8, dtype=torch.int32), [3] * len(new), new)
    query, keys = torch.randn(2, HEADS, DIM), torch.randn(8, KV_HEADS, DIM)
    assert slots.attend_new_tokens(query, keys, keys, tokens, PATTERN, scale=1.0).eq(0).all()


def test_rows_that_pad_are_zero(backend_module: Any) -> None:
    """SGLang pads a step's tokens for its graphs; nothing reads those rows."""
    runner = Runner(backend_module, [layer(PATTERN)], [20])
    batch = runner.batch([0], [7], ForwardMode.EXTEND)
    runner.backend.init_forward_metadata(batch)
    query = torch.full((9, HEADS * DIM), torch.nan, dtype=torch.float64)
    query[:7] = runner.query[0][0, :7].flatten(1)
    key, value = runner.key[0][0, :7], runner.value[0][0, :7]
    out = runner.backend.forward(query, key, value, runner.layers[0], batch)
    assert out[7:].eq(0).all()
    torch.testing.assert_close(out[:7], runner.expected(0, 0)[:7].flatten(1), **EXACT)


def test_idle_ranks_attend_to_nothing(backend_module: Any) -> None:
    runner = Runner(backend_module, [layer(PATTERN)], [20])
    batch = runner.batch([0], [0], ForwardMode.IDLE)
    runner.backend.init_forward_metadata(batch)
    empty = torch.empty(0, HEADS * DIM)
    assert runner.backend.forward(empty, None, None, runner.layers[0], batch).shape == empty.shape


def test_saved_keys_are_not_written_again(backend_module: Any) -> None:
    """SGLang's fused kernels may have written them before."""
    runner = Runner(backend_module, [layer(PATTERN)], [20])
    batch = runner.batch([0], [7], ForwardMode.EXTEND)
    runner.backend.init_forward_metadata(batch)
    query, key, value = (texts[0][0, :7] for texts in (runner.query, runner.key, runner.value))
    runner.pool.set_kv_buffer(runner.layers[0], batch_loc(batch), key, value)
    wrong = torch.full_like(key, torch.nan)
    out = runner.backend.forward(
        query.flatten(1), wrong, wrong, runner.layers[0], batch, save_kv_cache=False
    )
    torch.testing.assert_close(out, runner.expected(0, 0)[:7].flatten(1), **EXACT)


def batch_loc(batch: ForwardBatch) -> Any:
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    return KVWriteLoc.for_batch(batch)


@pytest.mark.parametrize("mode", [ForwardMode.TARGET_VERIFY, ForwardMode.DRAFT_EXTEND_V2])
def test_other_modes_are_refused(backend_module: Any, mode: ForwardMode) -> None:
    runner = Runner(backend_module, [layer(PATTERN)], [20])
    batch = runner.batch([0], [7], mode)
    with pytest.raises(NotImplementedError, match=f"`forward_mode` {mode.name} is not served"):
        runner.backend.init_forward_metadata(batch)
    with pytest.raises(NotImplementedError, match=f"{mode.name} in a CUDA graph is not served"):
        runner.backend.init_forward_metadata_out_graph(batch)


def test_other_pools_are_refused_by_name(backend_module: Any) -> None:
    runner = Runner(backend_module, [layer(PATTERN)], [20], dtype=torch.float32)
    runner.token_to_kv_pool = SWAKVPool(8, 1, torch.float32, KV_HEADS, DIM, 1)
    with pytest.raises(ValueError, match=r"must be SGLang's MHATokenToKVPool .* got SWAKVPool"):
        backend_module.create(runner)
    for name, given, message in (
        ("dtype", torch.float8_e4m3fn, "unquantized, got torch.float8_e4m3fn"),
        ("is_quantized_kv_cache", True, "unquantized, got torch.float32"),
        ("dtype", torch.bfloat16, "the model's torch.float32 for spattention, got torch.bfloat16"),
        ("kv_cache_layout", "hnd", "must be 'nhd' for spattention, got 'hnd'"),
    ):
        runner.token_to_kv_pool = MHATokenToKVPool(8, 1, torch.float32, KV_HEADS, DIM, 1)
        setattr(runner.token_to_kv_pool, name, given)
        with pytest.raises(ValueError, match=message):
            backend_module.create(runner)


def test_graphs_without_kernels_are_refused(backend_module: Any) -> None:
    runner = Runner(backend_module, [layer(PATTERN)], [20], dtype=torch.float32)
    with pytest.raises(ValueError, match=r"`disable_decode_cuda_graph` must be set .* head_dim 8"):
        runner.backend.init_cuda_graph_state(2, 2)
