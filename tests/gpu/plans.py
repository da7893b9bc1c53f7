"""Plans of the Hopper kernels that the rules choose for larger calls, on small ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

from spattention import attention
from spattention.impl.triton import hopper


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
