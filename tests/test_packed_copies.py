"""Packed rows cost no copies beside the implementation's own: views alone lead to it and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import spattention as spa

TOKENS, HEADS, HEAD_DIM = 33, 2, 16
OFFSETS = torch.tensor([0, 20, TOKENS], dtype=torch.int32)
PATTERN = spa.BandPattern.shared_local(HEADS, TOKENS)


class Operators(TorchDispatchMode):
    """Names of the operators of PyTorch that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.names.append(str(function).removeprefix("aten.").partition(".")[0])
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("impl", ["blockwise", "triton"])
def test_packed_gradients_are_views(impl: str) -> None:
    """The gradient of `result[0]` would be a tensor of zeros and a copy into it, which rows without
    packing do not cost.
    """
    inputs = [torch.randn(TOKENS, HEADS, HEAD_DIM, requires_grad=True) for _ in range(3)]
    if impl == "triton" and not _runs(inputs):
        pytest.skip("needs Triton's interpreter")
    out, lse = spa.band_attention_varlen(
        *inputs, PATTERN, OFFSETS, OFFSETS, 20, 20, return_lse=True, impl=impl
    )
    with Operators() as operators:
        torch.autograd.grad([out, lse], inputs, [torch.ones_like(out), torch.ones_like(lse)])
    assert "select_backward" not in operators.names


def test_flattened_rows_of_models_are_views() -> None:
    """Transformers' rows `[1, H, T, D]` with offsets, to the operator and back."""
    attention = pytest.importorskip("spattention.hf.attention")
    mask = pytest.importorskip("spattention.hf.mask")
    inputs = [torch.randn(1, HEADS, TOKENS, HEAD_DIM, requires_grad=True) for _ in range(3)]
    offsets = {"cu_seq_lens_q": OFFSETS, "cu_seq_lens_k": OFFSETS}
    lengths = {"max_length_q": 20, "max_length_k": 20}
    out = attention._packed(*inputs, PATTERN, mask.Rows(), offsets | lengths)
    with Operators() as operators:
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert "select_backward" not in operators.names


def _runs(inputs: list[torch.Tensor]) -> bool:
    triton = pytest.importorskip("spattention.impl.triton")
    return triton.refusal(inputs[0], inputs[2]) is None
