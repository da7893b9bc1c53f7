"""The error that is allowed, for each result.

    allowed = max(2 max|plain - exact|, 4 max noise) + eps(dtype) max|exact|

`exact` is the reference in float64, `plain` the dense masked computation in the case's own dtype.
Twice the error of `plain` is enough wherever many elements are about as exact as the worst: two
draws of the same rounding error then have nearly the same maximum. It is not where one row decides,
such as one with two nearly equal large scores: its single error may be near 0 by luck in `plain`,
and no factor helps. `noise` is that row's standard deviation, which is not a matter of luck
(`rounding.py`), and four of them contain all but 1 in 16,000 errors of a normal distribution. The
model assumes one accumulator, which real products improve on, so what is seen stays below three.
The last term is the rounding of the result itself.

Neither part is a free factor: an error in the scale of 1e-5, or one key too few, exceeds both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cases import Case, run
from .oracle import exact, plain
from .rounding import noise

DEVIATIONS = 4


def check_error(
    name: str, actual: Tensor, rough: Tensor, truth: Tensor, deviation: float = 0.0
) -> None:
    """Assert that the error is allowed, infinities in the same places. Float64 has no better oracle
    than float64: 32 eps are added for it.

    Args:
        name: what the message calls the tensor.
        actual: the tensor under test; its dtype gives eps.
        rough: the same quantity from `plain`.
        truth: the same quantity in float64.
        deviation: the quantity's greatest standard deviation, from `noise`.
    """
    truth = truth.double()
    finite = truth.isfinite()
    different = actual.double()[~finite] != truth[~finite]
    assert actual.shape == truth.shape, f"{name}: shape {actual.shape}, expected {truth.shape}"
    assert not actual.isnan().any(), f"{name}: {int(actual.isnan().sum())} NaN"
    assert not different.any(), f"{name}: {int(different.sum())} infinities differ"
    if not finite.any():
        return
    exact_values = truth[finite]
    error = (actual.double()[finite] - exact_values).abs().max().item()
    plain_error = (rough.double()[finite] - exact_values).abs().max().item()
    largest = exact_values.abs().max().item()
    ulps = 33 if actual.dtype == torch.float64 else 1
    allowed = max(2 * plain_error, DEVIATIONS * deviation)
    allowed += ulps * torch.finfo(actual.dtype).eps * largest
    assert error <= allowed, (
        f"{name}: error {error:.3e} exceeds {allowed:.3e} (plain {plain_error:.3e}, noise "
        f"{deviation:.3e}, largest {largest:.3e})"
    )


def check_case(case: Case, *, backward: bool = True, seed: int = 0, **options: Any) -> None:
    """Run the case with `options` (such as `impl`) and check every output and gradient against
    float64."""
    grads = None
    if backward:
        generator = torch.Generator(device=case.query.device).manual_seed(seed)
        shape = (*case.query.shape[:-1], case.value.shape[-1])
        rows = shape[:2][::-1] if case.packed else shape[:3]
        d_out, d_lse = (
            torch.randn(size, generator=generator, device=case.query.device)
            for size in (shape, rows)
        )
        grads = (d_out.to(case.query.dtype), d_lse)
    truth, rough, actual = exact(case, grads), plain(case, grads), run(case, grads, **options)
    deviations = noise(case, grads)
    for name in truth:
        check_error(name, actual[name], rough[name], truth[name], deviations[name])
