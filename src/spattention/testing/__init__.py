"""Tools that tests and benchmarks share: cases, the exact result, and the error that is allowed.

    allowed = max(2 max|plain - exact|, 4 max noise) + eps(dtype) max|exact|

`tolerance.py` derives it.
"""

from .cases import Case, Tensors, finite_backward, run
from .oracle import exact, plain
from .rounding import noise
from .tolerance import check_case, check_error

__all__ = [
    "Case",
    "Tensors",
    "check_case",
    "check_error",
    "exact",
    "finite_backward",
    "noise",
    "plain",
    "run",
]
