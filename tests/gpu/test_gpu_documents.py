"""Tokens of another document of a row never matter to the kernels, whatever they hold, on a GPU."""

from __future__ import annotations

import pytest
import torch

from spattention import BandPattern
from spattention.testing import check_case

from .hostile import PLACES, check_hostile, documents

DEVICE = "cuda"
# Blocks of 64 tokens: documents end inside of them, and several are in one block. The row is whole
# blocks, which the kernels for Hopper need.
ENDS = (90, 133, 140, 333, 448)
PATTERN = BandPattern((((0, 90),), ((0, 40), (60, 400)), (), ((3, 300),)), 400)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(torch.bfloat16, 128), (torch.float16, 64), (torch.float32, 64), (torch.bfloat16, 256)],
)
@pytest.mark.parametrize("place", PLACES)
def test_another_document_never_matters(
    place: str, dtype: torch.dtype, head_dim: int, number: float
) -> None:
    case = documents(PATTERN, ENDS, dtype, head_dim, 2, DEVICE)
    check_case(case, impl="triton")
    for document in (0, 1, 2, 3, 4):
        tokens = slice(([0, *ENDS])[document], ENDS[document])
        check_hostile(case, place, tokens, number)
