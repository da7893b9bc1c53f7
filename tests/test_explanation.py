"""`explain` names the kernels of a call, and the reason why there are no faster ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import spattention as spa

PATTERN = spa.BandPattern.exclusive(2, 64)


def inputs(queries: int = 64, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.zeros(1, 2, tokens, 16, dtype=dtype) for tokens in (queries, 64, 64)]


def test_cpu_tensors_run_pytorch() -> None:
    found = spa.explain(*inputs(), PATTERN)
    assert (found.implementation, found.kernels) == ("blockwise", "PyTorch operations")
    assert str(found).splitlines() == [
        "blockwise: PyTorch operations",
        '`impl="triton"` needs CUDA tensors, got cpu.',
    ]


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
def test_given_implementations_are_named(impl: str) -> None:
    found = spa.explain(*inputs(), PATTERN, impl=impl)
    assert found.implementation == impl
    assert found.reasons == (f'`impl="{impl}"` was given.',)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "fast"}, "`impl` must be None or one of"),
        ({"sinks": torch.zeros(3)}, "sinks"),
        ({"query_start": -1}, "query_start"),
    ],
)
def test_wrong_arguments_raise(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spa.explain(*inputs(), PATTERN, **change)


def test_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spattention.attention.HAS_TRITON", False)
    assert "pip install" in spa.explain(*inputs(), PATTERN).reasons[0]
    with pytest.raises(ValueError, match="needs Triton"):
        spa.explain(*inputs(), PATTERN, impl="triton")
