"""Repeated eager calls of one form, which launch from a record, against calls that cannot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import spattention as spa
from spattention import binding
from spattention.binding import bind
from spattention.impl import triton
from spattention.impl.replay import Replay
from spattention.testing.cases import Case
from spattention.testing.oracle import exact, plain
from spattention.testing.tolerance import check_error

CALLS = 6
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "grouped": ({"key_heads": 2}, {}),
    "pitch": ({"tokens": 300}, {}),
    "long bands": ({"tokens": 4096, "batch": 1}, {}),
    "prefix": ({}, {"prefix": 4}),
    "long prefix": ({}, {"prefix": 80}),
    "head_dim 128": ({"head_dim": 128}, {}),
    "portable": ({"head_dim": 32}, {}),
    "portable prefix": ({"head_dim": 32}, {"prefix": 4}),
}
ARGUMENTS = ("scale", "sinks", "query_start", "key_start")
GRADIENTS = ("random", "of a sum", "transposed")


@pytest.fixture(autouse=True)
def fill_new_memory_with_nan() -> Iterator[None]:
    binding._form.cache_clear()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def draw(
    seed: int, batch: int = 2, key_heads: int = 4, tokens: int = 512, head_dim: int = 64
) -> list[torch.Tensor]:
    """Query, key and value of 4 query heads, as projections lay them out."""
    generator = torch.Generator("cuda").manual_seed(seed)
    found = []
    for heads in (4, key_heads, key_heads):
        shape = (batch, tokens, heads, head_dim)
        each = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        found.append(each.transpose(1, 2).requires_grad_())
    return found


def gradient_of(kind: str, out: torch.Tensor) -> torch.Tensor:
    """A gradient of the output, of several layouts."""
    if kind == "of a sum":
        return out.new_ones(()).expand(out.shape)
    if kind == "transposed":
        return torch.randn_like(out.transpose(2, 3).contiguous()).transpose(2, 3)
    return torch.randn_like(out)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("case", CASES)
def test_repeated_calls_equal_others(case: str, gradient: str) -> None:
    """Bit for bit: a call that returns the log-sum-exp never launches from a record."""
    sizes, prefix = CASES[case]
    pattern = spa.BandPattern.shared_local(4, sizes.get("tokens", 512), **prefix)
    kept = []  # so that later calls get other memory
    for seed in range(CALLS):
        tensors = draw(seed, **sizes)
        out = spa.band_attention(*tensors, pattern, impl="triton")
        expected, _ = spa.band_attention(*tensors, pattern, impl="triton", return_lse=True)
        assert torch.equal(out, expected), seed
        d_out = gradient_of(gradient, out)
        found = torch.autograd.grad(out, tensors, d_out)
        for name, each, other in zip("qkv", found, torch.autograd.grad(expected, tensors, d_out)):
            assert torch.equal(each, other), (seed, name)
        kept.append((tensors, out, d_out, found))
    form = binding.form_of(*tensors, pattern, None, (None, None, None))
    assert form is not None
    assert form.replays[True] is not None, "no call launched from a record"


@pytest.mark.filterwarnings("ignore")
def test_repeated_calls_of_other_layouts() -> None:
    """A head_dim that is not contiguous is copied in every call."""
    pattern = spa.BandPattern.shared_local(4, 512)
    for seed in range(CALLS):
        tensors = [
            each.detach().transpose(2, 3).contiguous().transpose(2, 3) for each in draw(seed)
        ]
        out = spa.band_attention(*tensors, pattern, impl="triton")
        expected, _ = spa.band_attention(*tensors, pattern, impl="triton", return_lse=True)
        assert torch.equal(out, expected), seed


@pytest.mark.filterwarnings("ignore")
def test_repeated_calls_on_other_streams() -> None:
    pattern = spa.BandPattern.shared_local(4, 512)
    for seed in range(CALLS):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            tensors = draw(seed)
            out = spa.band_attention(*tensors, pattern, impl="triton")
            (found, *_) = torch.autograd.grad(out.sum(), tensors)
            expected, _ = spa.band_attention(*tensors, pattern, impl="triton", return_lse=True)
            (other, *_) = torch.autograd.grad(expected.sum(), tensors)
        stream.synchronize()
        assert torch.equal(out, expected)
        assert torch.equal(found, other)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", [(2,), (2, 512)])
def test_repeated_calls_with_key_start(shape: tuple[int, ...]) -> None:
    """Padding and documents, of which each call has others."""
    pattern = spa.BandPattern.shared_local(4, 512)
    for seed in range(CALLS):
        tensors = draw(seed)
        start = torch.full((2,), 64 * seed, dtype=torch.int32, device="cuda")
        if len(shape) == 2:  # one document more begins at a token of its own
            position = torch.arange(512, device="cuda")
            start = torch.where(position < start[:, None], 0, start[:, None]).to(torch.int32)
        out = spa.band_attention(*tensors, pattern, key_start=start, impl="triton")
        expected, _ = spa.band_attention(
            *tensors, pattern, key_start=start, impl="triton", return_lse=True
        )
        assert torch.equal(out, expected), seed
        d_out = torch.randn_like(out)
        found = torch.autograd.grad(out, tensors, d_out)
        for each, other in zip(found, torch.autograd.grad(expected, tensors, d_out)):
            assert torch.equal(each, other), seed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_repeated_calls_in_five_products(head_dim: int, deterministic: bool) -> None:
    """Gradients that sum in turn or in any order, against float64 in another batch entry and head
    each time, at sizes where five products per tile are the plan.
    """
    tokens, heads, batch = 5400, 4, 11
    bands = ((0, tokens),), ((0, 1024), (1536, tokens)), ((0, 64), (300, tokens)), ((0, 4000),)
    pattern = spa.BandPattern(intervals=bands, span=tokens)
    options: dict[str, Any] = {"impl": "triton", "deterministic": deterministic}
    kept = []  # so that later calls get other memory
    for seed in range(CALLS):
        tensors = draw(seed, batch, heads, tokens, head_dim)
        out = spa.band_attention(*tensors, pattern, **options)
        d_out = gradient_of("random", out)
        found = (out, *torch.autograd.grad(out, tensors, d_out))
        if seed == 0:
            call = bind(*tensors, pattern, **dict.fromkeys(ARGUMENTS))
            name, _ = triton.describe(call._replace(deterministic=deterministic))
            assert "five products" in name
        entry, head = seed * 3 % batch, seed % heads
        at = slice(entry, entry + 1), slice(head, head + 1)
        query, key, value = (each.detach()[at] for each in tensors)
        case = Case(query, key, value, pattern.heads(head, head + 1))
        gradients = d_out[at].float(), d_out.new_zeros((1, 1, tokens), dtype=torch.float32)
        truth, rough = exact(case, gradients), plain(case, gradients)
        for each, result in zip(("out", "d_query", "d_key", "d_value"), found):
            check_error(f"{each} of call {seed}", result.detach()[at], rough[each], truth[each])
        kept.append((tensors, d_out, found))
    form = binding.form_of(*tensors, pattern, None, (None, None, None))
    assert form is not None
    replay = form.replays[deterministic]
    assert isinstance(replay, Replay)
    assert replay.backward, "no backward pass launched from a record"
