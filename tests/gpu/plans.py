"""Plans of the Hopper kernels that the rules choose for larger calls, on small ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from spattention import attention
from spattention.impl.triton import hopper
from spattention.impl.triton.hopper import TileOrder

from .cases import Variant

ORDERS = (
    (TileOrder.HEAD_MAJOR, True, True),
    (TileOrder.HEAD_MAJOR, False, False),
    (TileOrder.PAIRED, False, True),
)
# Blocks of queries that programs draw from a counter
DRAWN: dict[str, Any] = {"order": TileOrder.HEAD_MAJOR, "persistent": True, "waves": 1}


def larger_plans(variant: Variant) -> list[dict[str, Any]]:
    """Fields of the plans that the rules choose for more heads, more tokens and longer bands."""
    if variant.mode != "self":  # those know one forward kernel and no pairs
        orders = [(TileOrder.HEAD_MAJOR, False, split) for split in (True, False)]
    else:
        orders = list(ORDERS)
    return [dict(zip(("order", "persistent", "split_backward"), each)) for each in orders]


@contextmanager
def changed_plans(**fields: Any) -> Iterator[None]:
    """Every plan with these fields of `HopperPlan`; no call runs as an earlier one did."""
    rule = hopper.plan

    def plan(*inputs: Any) -> hopper.HopperPlan | None:
        found = rule(*inputs)
        return None if found is None else replace(found, **fields)

    with (
        mock.patch.object(hopper, "plan", plan),
        mock.patch.object(attention, "form_of", return_value=None),
    ):
        yield


@contextmanager
def multiprocessors(count: int) -> Iterator[None]:
    """A GPU of `count` multiprocessors, so that small cases have more blocks than programs."""
    real = torch.cuda.get_device_properties()
    named = {name: getattr(real, name) for name in dir(real) if not name.startswith("_")}
    properties = SimpleNamespace(**named | {"multi_processor_count": count})
    with mock.patch.object(torch.cuda, "get_device_properties", return_value=properties):
        yield
