"""The kernels against float64: 2,120 random cases, with every output and work space full of NaN
beforehand, and NaN in every key that no query sees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from spattention.impl.triton.hopper import TileOrder
from spattention.testing import check_error, exact, plain, run
from tests.views import VIEWS, check_view

from .cases import VARIANTS, Variant, draw, poison_unseen
from .plans import changed_plans, larger_plans

CASES_OF_A_VARIANT = 106
CASES_OF_A_PLAN = 40


@pytest.fixture(autouse=True)
def fill_new_memory_with_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_random_cases(variant: Variant) -> None:
    check_cases(variant, CASES_OF_A_VARIANT)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("variant", "plan"),
    [(each, plan) for each in VARIANTS if each.hopper for plan in larger_plans(each)],
    ids=str,
)
def test_random_cases_of_larger_plans(variant: Variant, plan: dict[str, Any]) -> None:
    """What the rules choose for more heads, more tokens and longer bands, on small cases."""
    with changed_plans(**plan):
        check_cases(variant, CASES_OF_A_PLAN)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", [each for each in VARIANTS if each.fuses], ids=str)
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("order", [TileOrder.HEAD_MAJOR, TileOrder.ROUND_ROBIN])
def test_random_cases_in_five_products(
    variant: Variant, deterministic: bool, order: TileOrder
) -> None:
    with changed_plans(order=order, fused_backward=True):
        check_cases(variant, CASES_OF_A_PLAN, deterministic=deterministic)


def check_cases(variant: Variant, count: int, **options: Any) -> None:
    assert torch.empty(4, device="cuda").isnan().all()
    for seed in range(count):
        case = draw(variant, seed)
        generator = torch.Generator("cuda").manual_seed(seed)
        rows = case.query.shape[:2][::-1] if case.packed else case.query.shape[:3]
        grads = (
            torch.randn(case.query.shape, generator=generator, device="cuda").to(variant.dtype),
            torch.randn(rows, generator=generator, device="cuda"),
        )
        truth, rough = exact(case, grads), plain(case, grads)
        found = run(poison_unseen(case), grads, impl="triton", **options)
        for name in truth:
            check_error(f"seed {seed}: {name}", found[name], rough[name], truth[name])


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(torch.bfloat16, 128), (torch.bfloat16, 64), (torch.float32, 32)],
    ids=str,
)
@pytest.mark.parametrize("queries", [9, 16])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("view", VIEWS)
def test_memory_orders(
    view: str, place: int, queries: int, dtype: torch.dtype, head_dim: int
) -> None:
    check_view(
        view, place, "triton", queries=queries, head_dim=head_dim, dtype=dtype, device="cuda"
    )
