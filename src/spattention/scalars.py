"""Numbers as users pass them: Python's, NumPy's, or in a tensor of one value."""

from __future__ import annotations

import operator
from numbers import Integral, Real
from typing import Any

import torch

LARGEST_SIZE = 2**31 - 1  # of anything that is counted; positions are int32


def as_int(value: Any) -> int | None:
    """The value as an int; None for a bool, and for whatever is no integer."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or getattr(value, "dtype", None) is torch.bool:
        return None
    if isinstance(value, torch.Tensor) and not has_values(value):
        return None
    try:
        return operator.index(value)
    except TypeError:  # among them tensors of floating point, and of several values
        return None


def int_at_least(name: str, value: Any, least: int, most: int = LARGEST_SIZE) -> int:
    """The value of an argument as an int from `least` to `most`; raises `ValueError`."""
    found = as_int(value)
    if found is None or found < least:
        raise ValueError(
            f"`{name}` must be an integer of at least {least}, got {shown_number(value)}"
        )
    if found > most:
        raise ValueError(f"`{name}` must be at most {most}, got {shown_number(found)}")
    return found


def shown_number(number: Any) -> str:
    """A value for a message; an integer of more than 64 bits by its length, which is readable."""
    if isinstance(number, int) and number.bit_length() > 63:
        return f"an integer of {number.bit_length() + 1} bits"
    return repr(number)


def python_number(value: Any) -> Any:
    """Numbers of NumPy as Python's; anything else as it is, tensors and symbols among them."""
    if isinstance(value, int | float) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def as_flag(name: str, value: Any) -> bool:
    """True or False, NumPy's too; raises `ValueError` for whatever else."""
    if isinstance(value, bool):
        return value
    kind = type(value)
    if kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_"):
        return bool(value)
    raise ValueError(f"`{name}` must be True or False, got {value!r}")


def as_number(value: Any) -> int | float | None:
    """The value as an int or a float; None for a bool, and for whatever is no real number."""
    whole = as_int(value)
    if whole is not None:
        return whole
    if isinstance(value, torch.Tensor):
        single = has_values(value) and value.numel() == 1 and value.is_floating_point()
        return value.item() if single else None
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None


def has_values(tensor: torch.Tensor) -> bool:
    """False for a tensor on the meta device, and for a sparse, nested or quantized one."""
    dense = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized
    return dense and tensor.device.type != "meta"
