"""`impl="blockwise"` on a GPU: batched products instead of the CPU's attention kernel, against
float64 on the kernels' own random cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spattention import BandPattern
from spattention.testing import Case, check_case, run

from .cases import VARIANTS, Variant, draw

CASES_OF_A_VARIANT = 12
SHAPE = (2, 4, 700, 64)  # more than one block of each band


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_random_cases(variant: Variant) -> None:
    for seed in range(CASES_OF_A_VARIANT):
        check_case(draw(variant, seed), seed=seed, impl="blockwise")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [BandPattern.exclusive, BandPattern.shared_local])
def test_longer_rows_than_a_block(make: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(SHAPE, generator=generator, device="cuda").to(dtype) for _ in range(3)
    )
    check_case(Case(query, key, value, make(SHAPE[1], SHAPE[2])), impl="blockwise")


@pytest.mark.filterwarnings("ignore")
def test_the_bits_of_two_runs_are_the_same() -> None:
    case = draw(Variant(torch.bfloat16, 64, "self", 2, group=2), 3)
    grads = (torch.ones_like(case.query), torch.ones(case.query.shape[:3], device="cuda"))
    first, second = (run(case, grads, impl="blockwise") for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
