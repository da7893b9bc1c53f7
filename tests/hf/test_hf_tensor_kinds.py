"""Tensors that hold no values, or not as others do, are refused by name wherever one is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import build
from torch import Tensor

import spattention as spa

PATTERN = spa.BandPattern.shared_local(4, 96)
QUERY, KEY, LSE = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.zeros(1, 4, 5)
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "meta": lambda tensor: tensor.to("meta"),
    "sparse": lambda tensor: tensor.to_sparse(),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor]),
}


def packed(**options: Any) -> Any:
    query, key = QUERY[0].transpose(0, 1), KEY[0].transpose(0, 1)
    offsets = torch.tensor([0, 5], dtype=torch.int32)
    given = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, **options}
    return spa.band_attention_varlen(
        query, key, key, PATTERN, max_seqlen_q=5, max_seqlen_k=5, **given
    )


def cached(**options: Any) -> Any:
    return spa.band_attention_cached(QUERY, store(), PATTERN, KEY, KEY, **options)


def store() -> spa.BandStore:
    return spa.BandStore(PATTERN, 1, 2, 8)


INTEGER = torch.zeros(1, dtype=torch.int32)
CALLS: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "query": (lambda t: spa.band_attention(t, KEY, KEY, PATTERN), QUERY),
    "key": (lambda t: spa.band_attention(QUERY, t, KEY, PATTERN), KEY),
    "value": (lambda t: spa.band_attention(QUERY, KEY, t, PATTERN), KEY),
    "sinks": (lambda t: spa.band_attention(QUERY, KEY, KEY, PATTERN, sinks=t), torch.zeros(4)),
    "key_start": (lambda t: spa.band_attention(QUERY, KEY, KEY, PATTERN, key_start=t), INTEGER),
    "query_start": (lambda t: spa.band_attention(QUERY, KEY, KEY, PATTERN, query_start=t), INTEGER),
    "cu_seqlens_q": (lambda t: packed(cu_seqlens_q=t), torch.tensor([0, 5], dtype=torch.int32)),
    "sinks of documents": (lambda t: packed(sinks=t), torch.zeros(4)),
    "sinks of a cache": (lambda t: cached(sinks=t), torch.zeros(4)),
    "sinks of validate": (
        lambda t: spa.validate(QUERY, KEY, KEY, PATTERN, sinks=t),
        torch.zeros(4),
    ),
    "key of a store": (lambda t: store().append(t, KEY), KEY),
    "mask of a store": (lambda t: store().append(KEY, KEY, mask=t), torch.ones(1, 5).bool()),
    "rows of a store": (lambda t: store().reorder(t), torch.zeros(1, dtype=torch.int64)),
    "out of merge": (lambda t: spa.merge([(QUERY, LSE), (t, LSE)]), QUERY),
    "lse of merge": (lambda t: spa.merge([(QUERY, LSE), (QUERY, t)]), LSE),
    "sinks of merge": (lambda t: spa.merge([(QUERY, LSE)], sinks=t), torch.zeros(4)),
    "sinks of apply": (
        lambda t: spa.hf.apply(build("llama"), PATTERN, sinks=[t, t]),
        torch.zeros(4),
    ),
    "tokens of profile": (
        lambda t: spa.hf.profile(build("llama"), [t], progress=False),
        torch.zeros(1, 8, dtype=torch.int64),
    ),
    "a size": (lambda t: spa.BandStore(PATTERN, t, 2, 8), torch.ones(1, dtype=torch.int64)),
    "a span": (lambda t: spa.BandPattern.dense(4, t), torch.ones(1, dtype=torch.int64)),
    "a number of sinks": (
        lambda t: spa.hf.apply(build("llama"), PATTERN, sinks=t),
        torch.zeros(1),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_a_tensor_without_values_is_refused(name: str, kind: str) -> None:
    call, tensor = CALLS[name]
    with pytest.raises(ValueError, match=r"`[a-z_]+`.* must "):
        call(KINDS[kind](tensor))


def test_sinks_are_in_a_dtype_that_computes() -> None:
    values = torch.zeros(4, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"`sinks` of layer 0 must be .* got torch\.float8_e4m3fn"):
        spa.hf.apply(build("llama"), PATTERN, sinks=[values, values])
