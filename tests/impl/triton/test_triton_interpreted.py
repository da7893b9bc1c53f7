"""Every feature of the portable kernels on small cases, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_cases import case, int32
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import spattention as spa
from spattention.impl.triton import op
from spattention.testing import Case, check_case
from tests.views import VIEWS, check_view

pytestmark = pytest.mark.skipif(not op.INTERPRETED, reason="the kernels run on the GPU here")
P = spa.BandPattern
GENERATOR = torch.Generator().manual_seed(0)
TWO_BANDS = P((((0, 3), (7, 12)), ((0, 30),), (), ((2, 5), (20, 26))), 30)


def _case(
    pattern: spa.BandPattern, queries: int = 21, keys: int = 21, *rest: Any, **options: Any
) -> Case:
    return case(pattern, queries, keys, *rest, **options)


CASES = {
    "exclusive": lambda: _case(P.exclusive(3, 21)),
    "shared local, float16, head_dim 20": lambda: _case(
        P.shared_local(2, 21), head_dim=20, dtype=torch.float16
    ),
    "two bands, an empty head, grouped heads, sinks": lambda: _case(
        TWO_BANDS, 33, 33, key_heads=2, sinks=True, batch=1
    ),
    "more heads than tokens": lambda: _case(P.exclusive(5, 3), 3, 3, batch=1, dtype=torch.float16),
    "one token": lambda: _case(P.dense(1, 1), 1, 1, dtype=torch.float16),
    "last queries": lambda: _case(P.shared_local(2, 40), 5, 37),
    "start on the device": lambda: _case(P.shared_local(2, 40), 7, 30, query_start=int32(4, 23)),
    "left padding": lambda: _case(P.shared_local(2, 21), key_start=int32(3, 40)),
    "documents in a row": lambda: _case(
        P.exclusive(2, 33),
        33,
        33,
        batch=1,
        key_start=int32([[0] * 17 + [17] * 16]),
    ),
    "negative scale": lambda: _case(P.exclusive(2, 21), scale=-0.3, batch=1),
}


@pytest.mark.parametrize("name", CASES)
def test_feature(name: str) -> None:
    check_case(CASES[name](), impl="triton")


def test_last_queries_are_a_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Hopper, where they run packed: prefix, grouped heads, sinks, all gradients."""
    monkeypatch.setattr(op, "compute_capability", lambda device: (9, 0))
    given = case(TWO_BANDS, 19, 31, key_heads=2, sinks=True, batch=1)
    check_case(replace(given, pattern=replace(TWO_BANDS, prefix=3)), impl="triton")
    assert (19, 31) in op._offsets.entries[given.query.device]


def test_packed_documents() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths, more = [17, 0, 3], [17, 2, 20]
    draw = [torch.randn(n, 2, 16, generator=generator) for n in (20, 39, 39)]
    options = {
        "cu_seqlens_q": int32(0, 17, 17, 20),
        "cu_seqlens_k": int32(0, 17, 19, 39),
        "max_seqlen_q": max(lengths),
        "max_seqlen_k": max(more),
    }
    check_case(Case(*draw, P.shared_local(2, 24), options), impl="triton")


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("view", VIEWS)
def test_any_memory_order_gives_the_same(view: str, place: int) -> None:
    check_view(view, place, "triton")


def test_strides_are_taken_as_they_are() -> None:
    case = _case(P.exclusive(2, 21), batch=1)
    wide = torch.randn(1, 21, 2, 40, generator=torch.Generator().manual_seed(1))
    query, key = wide[..., :16].transpose(1, 2), wide[..., 24:].transpose(1, 2)
    case = replace(case, query=query, key=key)
    check_case(case, impl="triton")


def test_keys_after_the_last_query_are_not_read() -> None:
    case = _case(P.shared_local(2, 40), 5, 37, batch=1, query_start=11)
    case.key[:, :, 16:] = torch.nan
    case.value[:, :, 16:] = torch.nan
    out = spa.band_attention(
        case.query, case.key, case.value, case.pattern, impl="triton", query_start=11
    )
    assert out.isfinite().all()


def test_an_edit_changes_later_outputs_alone() -> None:
    case = _case(P.dense(1, 21), batch=1)

    def run(value: torch.Tensor) -> torch.Tensor:
        return spa.band_attention(case.query, case.key, value, case.pattern, impl="triton")

    edited = case.value.clone()
    edited[:, :, 9] += 1
    changed = (run(case.value) != run(edited)).any(dim=-1)[0, 0]
    assert changed.tolist() == [False] * 9 + [True] * 12


def test_refusals_name_the_reason() -> None:
    case = _case(P.dense(1, 8), 8, 8, batch=1)
    inputs = [t.double() for t in (case.query, case.key, case.value)]
    with pytest.raises(ValueError, match="float64"):
        spa.band_attention(*inputs, case.pattern, impl="triton")
    with pytest.raises(ValueError, match="value's head_dim"):
        spa.band_attention(case.query, case.key, case.value[..., :8], case.pattern, impl="triton")


@pytest.mark.parametrize("queries", [1, 12])
@pytest.mark.parametrize("start", [0, 1 << 29, (1 << 29) + 1, 1 << 31, 1 << 40])
def test_starts_beyond_32_bits_are_refused(start: int, queries: int) -> None:
    inputs = [torch.randn(1, 2, tokens, 16) for tokens in (queries, 12, 12)]
    pattern, limit = P.dense(2, 12), 1 << 29
    if start > limit:
        with pytest.raises(ValueError, match=f"`query_start` must be at most .*got {start}"):
            spa.band_attention(*inputs, pattern, query_start=start, impl="triton")
        return
    found, expected = (
        spa.band_attention(*inputs, pattern, query_start=start, impl=impl)
        for impl in ("triton", "reference")
    )
    torch.testing.assert_close(found, expected)


def test_second_derivatives_are_refused() -> None:
    case = _case(P.dense(1, 4), 4, 4, batch=1)
    query = case.query.requires_grad_()
    out = spa.band_attention(query, case.key, case.value, case.pattern, impl="triton")
    (gradient,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="`band_attention` has first derivatives"):
        gradient.sum().backward()


SEEN: list[tuple[str, bool]] = []  # an operator, and whether it was met above autograd


class Functions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        SEEN.append((str(function), torch.is_grad_enabled()))
        return function(*args, **kwargs or {})


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        SEEN.append((str(function), False))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", [Functions, Dispatches])
def test_modes_see_the_operators_once(mode: Any, training: bool) -> None:
    """Selective checkpointing and tracers look on from there."""
    inputs = [torch.randn(1, 2, 9, 16, requires_grad=training) for _ in range(3)]
    SEEN.clear()
    with mode():
        out = spa.band_attention(*inputs, P.exclusive(2, 9), impl="triton")
        if training:
            out.backward(torch.ones_like(out))
    seen = [each for each in SEEN if each[0].startswith("spattention.")]
    # No mode of functions looks into a backward pass.
    forward, backward = "spattention.triton_forward.default", "spattention.triton_backward.default"
    if mode is Functions:
        assert seen == [(forward, True)]
    else:
        assert seen == [(forward, False), (backward, False)][: 1 + training]


@pytest.mark.parametrize("queries", [9, 1])
def test_strided_sinks(queries: int) -> None:
    """One row of a parameter for all layers, and one logit for all heads."""
    inputs = [torch.randn(1, 2, n, 16, generator=GENERATOR) for n in (queries, 9, 9)]
    for sinks in (torch.randn(2, 3)[:, 1], torch.randn(1).expand(2)):
        found, expected = (
            spa.band_attention(*inputs, P.exclusive(2, 9), sinks=sinks, impl=impl)
            for impl in ("triton", "reference")
        )
        torch.testing.assert_close(found, expected)


def test_strided_offsets() -> None:
    inputs = [torch.randn(9, 2, 16, generator=GENERATOR) for _ in range(3)]
    offsets = int32([[0, 7], [4, 7], [9, 7]])[:, 0]
    found, expected = (
        spa.band_attention_varlen(*inputs, P.exclusive(2, 9), offsets, offsets, 5, 5, impl=impl)
        for impl in ("triton", "reference")
    )
    torch.testing.assert_close(found, expected)


def test_vmap_and_its_gradients() -> None:
    inputs = [torch.randn(3, 1, 2, 9, 16, requires_grad=True) for _ in range(3)]

    def attend(*each: torch.Tensor) -> Any:
        return spa.band_attention(*each, P.exclusive(2, 9), impl="triton")

    found = torch.func.vmap(attend)(*inputs)
    expected = torch.stack([attend(*each) for each in zip(*inputs)])
    assert torch.equal(found, expected)
    for pair in zip(
        *(torch.autograd.grad(out.square().sum(), inputs) for out in (found, expected))
    ):
        assert torch.equal(*pair)
