"""The kernels against float64: 2,120 random cases, with every output and work space full of NaN
beforehand, and NaN in every key that no query sees."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from spattention.testing import check_error, exact, plain, run

from .cases import VARIANTS, Variant, draw, poison_unseen

CASES_OF_A_VARIANT = 106


@pytest.fixture(autouse=True)
def fill_new_memory_with_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_random_cases(variant: Variant) -> None:
    assert torch.empty(4, device="cuda").isnan().all()
    for seed in range(CASES_OF_A_VARIANT):
        case = draw(variant, seed)
        generator = torch.Generator("cuda").manual_seed(seed)
        rows = case.query.shape[:2][::-1] if case.packed else case.query.shape[:3]
        grads = (
            torch.randn(case.query.shape, generator=generator, device="cuda").to(variant.dtype),
            torch.randn(rows, generator=generator, device="cuda"),
        )
        truth, rough = exact(case, grads), plain(case, grads)
        found = run(poison_unseen(case), grads, impl="triton")
        for name in truth:
            check_error(f"seed {seed}: {name}", found[name], rough[name], truth[name])
