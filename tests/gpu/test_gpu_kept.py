"""A kept kernel is the one that Triton would have found, whatever the dtypes, strides, alignments
and values of a call.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import spattention as spa
from spattention.impl.triton.kernel import Kernel
from spattention.testing import Case, run

from . import decode_cases as decoding
from .cases import VARIANTS, Variant, draw

CASES_OF_A_VARIANT = 12


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernels that were launched; each is compared with what Triton finds for its call."""
    found: list[Any] = []
    launch = Kernel.__call__

    def checked(
        self: Kernel, programs: int, depends: Any, *arguments: Any, **constants: Any
    ) -> None:
        launch(self, programs, depends, *arguments, **constants)
        kept, _ = self.kept[depends, *constants.values()]
        assert kept is self.function[(programs,)](*arguments, **constants)
        found.append(kept)

    monkeypatch.setattr(Kernel, "__call__", checked)
    return found


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same values one element after an aligned address."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return torch.as_strided(room, tensor.shape, tensor.stride(), 1).copy_(tensor)


def check(case: Case, backward: bool) -> None:
    rows = case.query.shape[:2][::-1] if case.packed else case.query.shape[:3]
    d_lse = torch.randn(rows, device="cuda")
    inputs = [case.query, case.key, case.value, torch.randn_like(case.query)]
    for at in range(len(inputs) + 1):  # one of them not aligned, or none
        *moved, d_out = (shifted(each) if i == at else each for i, each in enumerate(inputs))
        if backward:
            run(Case(*moved, case.pattern, case.options), (d_out, d_lse), impl="triton")
        else:
            with torch.no_grad():
                spa.band_attention(*moved, case.pattern, impl="triton", **case.options)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_training(variant: Variant, asked: list[Any]) -> None:
    for seed in range(CASES_OF_A_VARIANT):
        check(draw(variant, seed), backward=True)
    assert len(asked) > len(set(asked))


@pytest.mark.parametrize("variant", decoding.VARIANTS, ids=str)
def test_decoding(variant: decoding.Variant, asked: list[Any]) -> None:
    for seed in range(CASES_OF_A_VARIANT):
        check(decoding.draw(variant, seed), backward=False)
    assert len(asked) > len(set(asked))


def test_stores(asked: list[Any]) -> None:
    pattern = spa.BandPattern.shared_local(4, 64)
    for tokens in (1, 2, 3, 16, 40):
        store = spa.BandStore(pattern, 2, 2, 64, device="cuda", dtype=torch.bfloat16, slack=40)
        for _ in range(3):
            key = torch.randn(2, 2, tokens, 64, device="cuda", dtype=torch.bfloat16)
            store.append(key, shifted(key))
    assert len(asked) > len(set(asked))
