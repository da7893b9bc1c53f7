"""`generate` with the caches that Transformers chooses by name, against stock attention under the
same mask, one token after the other and without a cache.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from tiny import FIRST, SECOND, Masked, banded, build, tokens
from transformers import cache_utils

import spattention as spa

NEW = 20
PREFIXED = spa.BandPattern(SECOND.intervals, span=SECOND.span, prefix=2)


class Stream:
    """A stand-in for a CUDA stream: offloading needs one, of which a CPU has none."""

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass


class Rounded(cache_utils.QuantizedLayer):
    """Quantisation to multiples of 2**-12, without a library for it."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return (tensor * 2**12).round()

    def _dequantize(self, q_tensor: torch.Tensor) -> torch.Tensor:
        return q_tensor / 2**12


def reference(patterns: Any, ids: torch.Tensor) -> torch.Tensor:
    masked = Masked(build("llama"), patterns)
    for _ in range(NEW):
        with torch.no_grad():
            following = masked(ids, use_cache=False).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, following], dim=1)
    return ids


def quantized(residual: int) -> Any:
    return cache_utils.Cache(layers=[Rounded(residual_length=residual) for _ in range(2)])


CACHES = {
    "dynamic": lambda: {"cache_implementation": "dynamic"},
    "static": lambda: {"cache_implementation": "static"},
    "hybrid": lambda: {"cache_implementation": "hybrid"},
    "sliding_window": lambda: {"cache_implementation": "sliding_window"},
    "offloaded": lambda: {"cache_implementation": "offloaded"},
    "offloaded_static": lambda: {"cache_implementation": "offloaded_static"},
    "quantized": lambda: {"past_key_values": quantized(128)},
    "quantized_soon": lambda: {"past_key_values": quantized(4)},
    "chunks": lambda: {"prefill_chunk_size": 4},
    "quantized_chunks": lambda: {"past_key_values": quantized(4), "prefill_chunk_size": 4},
    "none": lambda: {"use_cache": False},
}


@pytest.mark.parametrize("patterns", [(FIRST, SECOND), (PREFIXED, None)], ids=["all", "some"])
@pytest.mark.parametrize("cache", CACHES)
def test_caches_by_name_give_the_tokens_of_the_mask(
    cache: str, patterns: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: Stream())
    model, ids = banded("llama", patterns), tokens(2, 9)
    settings = {"max_new_tokens": NEW, "do_sample": False, "disable_compile": True}
    found = model.generate(ids, **settings, **CACHES[cache]())
    assert found.tolist() == reference(patterns, ids).tolist()


@pytest.mark.parametrize("way", ["prompt_lookup", "early_exit", "dense", "banded"])
@pytest.mark.parametrize("cache", [None, "band"])
def test_drafts_of_every_kind_leave_the_tokens(way: str, cache: str | None) -> None:
    model, ids = banded("llama"), tokens(1, 9)
    keywords: dict[str, Any] = {
        "prompt_lookup": {"prompt_lookup_num_tokens": 5},
        "early_exit": {"assistant_early_exit": 1},
        "dense": {"assistant_model": build("llama", seed=1)},
        "banded": {"assistant_model": banded("llama", seed=1)},
    }[way]
    if cache == "band":
        keywords["past_key_values"] = spa.hf.BandCache(model.config)
    found = model.generate(ids, max_new_tokens=NEW, do_sample=False, **keywords)
    assert found.tolist() == reference((FIRST, SECOND), ids).tolist()


def test_a_used_cache_is_continued_copied_and_cropped() -> None:
    """Between turns of a dialogue."""
    model, ids = banded("llama"), tokens(2, 9)
    wanted = reference((FIRST, SECOND), ids).tolist()
    for cache in (transformers.DynamicCache(config=model.config), spa.hf.BandCache(model.config)):
        settings = {"do_sample": False, "disable_compile": True}
        first = model.generate(ids, past_key_values=cache, max_new_tokens=12, **settings)
        other = copy.deepcopy(cache)
        more = NEW - 12
        again = model.generate(first, past_key_values=cache, max_new_tokens=more, **settings)
        assert again.tolist() == wanted
        other.crop(-5)
        shorter = first[:, : 9 + 12 - 5]
        again = model.generate(shorter, past_key_values=other, max_new_tokens=more + 5, **settings)
        assert again.tolist() == wanted
