"""Calls of one form are checked once; what another call may not share is checked again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import spattention as spa
from spattention import binding

TOKENS, HEADS = 24, 2
PATTERN = spa.BandPattern.shared_local(HEADS, TOKENS)


def tensors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(1, HEADS, TOKENS, 16).to(dtype) for _ in range(3)]


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The patterns of the calls whose shapes were checked."""
    found: list[Any] = []
    check = binding.check_attention

    def watched(query: Any, key: Any, value: Any, pattern: Any, **options: Any) -> None:
        found.append(pattern)
        check(query, key, value, pattern, **options)

    monkeypatch.setattr(binding, "check_attention", watched)
    binding._form.cache_clear()
    return found


def test_a_form_is_checked_once(checked: list[Any]) -> None:
    for _ in range(3):
        spa.band_attention(*tensors(), PATTERN)
    assert len(checked) == 1
    spa.band_attention(*tensors(torch.float64), PATTERN)
    spa.band_attention(*tensors(), PATTERN, scale=0.5)
    query, key, value = tensors()
    spa.band_attention(query[:, :, 4:], key, value, PATTERN)
    assert len(checked) == 4


def test_wrong_calls_raise_every_time(checked: list[Any]) -> None:
    """Also after a call that differs from them in what Python takes for equal."""
    query, key, value = tensors()
    spa.band_attention(query[:, :, :1], key, value, PATTERN, query_start=1)
    for _ in range(2):
        with pytest.raises(ValueError, match="`query_start` must be an int"):
            spa.band_attention(query[:, :, :1], key, value, PATTERN, query_start=True)
        with pytest.raises(ValueError, match="`scale` must be a float"):
            spa.band_attention(query, key, value, PATTERN, scale=True)
        with pytest.raises(ValueError, match="has 3 heads"):
            spa.band_attention(query, key, value, spa.BandPattern.dense(3, TOKENS))
        with pytest.raises(ValueError, match="`key_start` must be an int32 tensor"):
            spa.band_attention(query, key, value, PATTERN, key_start=[0])


def test_values_on_the_cpu_are_checked_every_time(checked: list[Any]) -> None:
    start = torch.zeros(1, TOKENS, dtype=torch.int32)
    spa.band_attention(*tensors(), PATTERN, key_start=start)
    start[0, 3] = 3
    with pytest.raises(ValueError, match="must never decrease along a row, got 3 then 0"):
        spa.band_attention(*tensors(), PATTERN, key_start=start)


@pytest.mark.filterwarnings("ignore")
def test_calls_that_others_must_see_have_no_form() -> None:
    """Compilers, transforms, modes and subclasses meet an operator in PyTorch's dispatcher."""
    query, key, value = tensors()

    def form(query: torch.Tensor) -> Any:
        options: dict[str, Any] = {"sinks": None, "query_start": None, "key_start": None}
        return binding.bind(query, key, value, PATTERN, scale=None, **options).form

    assert form(query) is not None
    assert form(query) is form(query.clone())
    seen: list[Any] = []

    def inside(query: torch.Tensor) -> torch.Tensor:
        seen.append(form(query))
        return query.sum()

    torch.func.grad(inside)(query)
    with FlopCounterMode(display=False):
        inside(query)
    inside(torch._neg_view(query))
    torch.jit.trace(inside, (query,), check_trace=False)
    assert seen == [None] * 4
