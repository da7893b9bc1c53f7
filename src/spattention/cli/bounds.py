"""Bounds of numeric options: a value that no machine can serve is refused before work starts."""

from __future__ import annotations

from typing import Any

LARGEST = 2**31 - 1  # counts that libraries keep in 32 bits
LARGEST_SEED = 2**32 - 1  # NumPy's


def check_range(options: Any, **bounds: tuple[float, float]) -> None:
    """Check options against inclusive bounds; an option that is None is not checked.

    Args:
        options: of a command.
        bounds: `(least, most)` by the name of the option's field.

    Raises:
        ValueError: naming the option, its bound and the value; NaN is within no bounds.
    """
    for name, (least, most) in bounds.items():
        value = getattr(options, name)
        if value is None or least <= value <= most:
            continue
        bound = f"at most {most:,}" if value > most else f"at least {least:,}"
        raise ValueError(f"`--{name.replace('_', '-')}` must be {bound}, got {value}")
