"""Numbers of NumPy and of tensors mean what Python's mean; bools are no numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import spattention as spa
from spattention import baselines, related
from spattention.scalars import as_int, as_number

sys.path.insert(0, str(Path(__file__).parent / "hf"))
from tiny import banded, build, tokens

P = spa.BandPattern
FIRST = P.shared_local(4, 24)
INTEGERS = {"numpy": np.int64, "narrow": np.int32, "tensor": torch.tensor}
NUMBERS = {"numpy": np.float32, "narrow": np.float64, "tensor": torch.tensor}


def layout(number, model=None):
    """What `apply` left in a model, for comparison."""
    section = model.config.spattention
    sinks = [layer.self_attn.sinks.tolist() for layer in model.model.layers]
    return json.loads(json.dumps(section)), sinks


CALLS = {
    "pattern": lambda i, f: [
        P.shared_local(
            i(4), i(24), widths="geometric", first=i(2), local=i(3), kv_heads=i(2), prefix=i(1)
        ).to_dict(),
        P.exclusive(i(4), i(24), kv_heads=i(2)).to_dict(),
        P.sliding_window(i(4), i(24), i(3)).to_dict(),
        P.gapped(i(4), i(24), kv_heads=i(2)).to_dict(),
        P.local_only(i(4), i(24), kv_heads=i(2)).to_dict(),
    ],
    "deal": lambda i, f: spa.parallel.deal(FIRST, i(2), i(4)),
    "shards": lambda i, f: spa.parallel.Shards.balanced(i(8), i(2)).ranges,
    "plan": lambda i, f: spa.parallel.plan_exchange(
        FIRST, spa.parallel.Shards.balanced(8, 2), i(4)
    ),
    "sinks": lambda i, f: layout(f, spa.hf.apply(build("llama"), FIRST, sinks=f(0.5))),
    "whole_sinks": lambda i, f: layout(f, spa.hf.apply(build("llama"), FIRST, sinks=i(1))),
    "layers": lambda i, f: spa.hf.apply(
        build("llama"), FIRST, layers=[i(1)]
    ).config.spattention["layers"],
    "store": lambda i, f: list(
        spa.BandStore(FIRST, i(1), i(4), i(8), capacity=i(16), max_rollback=i(3)).keys.shape
    ),
    "cache": lambda i, f: crop(spa.hf.BandCache(banded("llama").config, max_rollback=i(3)), i(-2)),
    "hf_deal": lambda i, f: type(spa.hf.deal(banded("llama"), i(2))).__name__,
}  # fmt: skip


def crop(cache, count):
    banded("llama")(tokens(1, 9), past_key_values=cache)
    cache.crop(count)
    return int(cache.get_seq_length())


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("call", CALLS)
def test_numbers_are_taken_wherever_they_come_from(call, kind):
    found = CALLS[call](INTEGERS[kind], NUMBERS[kind])
    wanted = CALLS[call](int, float)
    assert found == wanted
    assert repr(found) == repr(wanted), "plain numbers, as JSON takes them"


@pytest.mark.parametrize("kind", INTEGERS)
def test_fitted_patterns_take_any_numbers(kind):
    integer, number = INTEGERS[kind], NUMBERS[kind]
    profile = spa.hf.profile(
        build("llama"), [tokens(1, 40)], prefix_max=integer(3), sensitivity=integer(1),
        progress=False,
    )  # fmt: skip
    found = spa.fit(
        profile, pairs=number(0.75), length=integer(24), span=integer(40), prefix=integer(2),
        local=integer(2), kv_heads=integer(2), dense_layers=[integer(0)],
    )  # fmt: skip
    wanted = spa.fit(
        profile, pairs=0.75, length=24, span=40, prefix=2, local=2, kv_heads=2, dense_layers=[0]
    )
    assert found == wanted


def test_operators_take_numbers_of_numpy():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 9, 8, dtype=torch.float64, generator=generator)
    wanted = spa.band_attention(query, query, query, FIRST, scale=0.5, query_start=0)
    found = spa.band_attention(
        query, query, query, FIRST, scale=np.float32(0.5), query_start=np.int64(0)
    )
    assert torch.equal(found, wanted)
    flat, offsets = query[0].transpose(0, 1), torch.tensor([0, 9], dtype=torch.int32)
    packed = spa.band_attention_varlen(
        flat, flat, flat, FIRST, offsets, offsets, np.int32(9), np.int64(9), scale=0.5
    )
    torch.testing.assert_close(packed.transpose(0, 1), wanted[0])


@pytest.mark.parametrize("make", [related.MEA, baselines.BigBird, baselines.Longformer])
def test_sections_of_baselines_hold_plain_numbers(make):
    """They are saved as JSON, which knows no others."""
    found = make(np.int64(4), torch.tensor(64))
    assert json.loads(json.dumps(found.section())) == json.loads(json.dumps(make(4, 64).section()))
    assert found == make(4, 64)


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True)])
@pytest.mark.parametrize(
    "call",
    [
        lambda b: P.exclusive(4, b),
        lambda b: P.exclusive(4, 24, prefix=b),
        lambda b: FIRST.pairs(b),
        lambda b: spa.parallel.deal(FIRST, b, 4),
        lambda b: spa.BandStore(FIRST, b, 4, 8),
        lambda b: spa.hf.apply(build("llama"), FIRST, layers=[b]),
        lambda b: related.MEA(4, b),
    ],
)
def test_bools_are_no_numbers(call, value):
    with pytest.raises(ValueError, match=r"`\w+`.* must be .*got .*True"):
        call(value)


@pytest.mark.parametrize("value", [1.0, "1", None, [1], torch.tensor([1, 2]), np.array([1.0]), 1j])
def test_only_integers_are_integers(value):
    assert as_int(value) is None


def test_numbers_are_real():
    assert as_number(torch.tensor(0.5)) == 0.5
    assert as_number(np.float16(0.5)) == 0.5
    for value in (1j, "0.5", None, True, torch.tensor([0.5, 1.0]), torch.tensor(1j)):
        assert as_number(value) is None


@pytest.mark.parametrize("value", [None, "no", 1, 0.0, [], torch.ones(2)], ids=repr)
@pytest.mark.parametrize("name", ["deterministic", "return_lse"])
def test_switches_are_true_or_false(name: str, value: object) -> None:
    """A word or a list is no switch, and is not taken for True."""
    tensors = [torch.zeros(1, 2, 4, 8) for _ in range(3)]
    pattern = spa.BandPattern.exclusive(2, 4)
    with pytest.raises(ValueError, match=f"`{name}` must be True or False, got"):
        spa.band_attention(*tensors, pattern, **{name: value})
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    packed = [each[0].transpose(0, 1) for each in tensors]
    with pytest.raises(ValueError, match=f"`{name}` must be True or False, got"):
        spa.band_attention_varlen(*packed, pattern, offsets, offsets, 4, 4, **{name: value})


def test_switches_of_numpy_are_taken() -> None:
    tensors = [torch.zeros(1, 2, 4, 8) for _ in range(3)]
    pattern = spa.BandPattern.exclusive(2, 4)
    assert isinstance(spa.band_attention(*tensors, pattern, return_lse=np.True_), tuple)
