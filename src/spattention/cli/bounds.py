"""Bounds of numeric options: a value that no machine can serve is refused before work starts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import check_place, shown

LARGEST = 2**31 - 1  # counts that libraries keep in 32 bits
LARGEST_SEED = 2**32 - 1  # NumPy's
LARGEST_HEAD_DIM = 256  # of the kernels
LARGEST_LENGTH = 2**29  # tokens, of the kernels
LARGEST_GRID = 2**16 - 1  # programs on an axis of a launch: heads, and batch entries
LARGEST_TENSOR = 2**36  # elements; no GPU holds queries, keys and values of this size


def check_range(options: Any, **bounds: tuple[float, float]) -> None:
    """Check options against inclusive bounds `(least, most)` by the names of their fields. An
    option that is None is not checked; NaN is within no bounds. Raises `ValueError` that names the
    option, its bound and the value."""
    for name, (least, most) in bounds.items():
        value = getattr(options, name)
        if value is None or least <= value <= most:
            continue
        bound = f"at most {most:,}" if value > most else f"at least {least:,}"
        raise ValueError(f"`--{name.replace('_', '-')}` must be {bound}, got {value}")


def check_each(option: str, values: Sequence[int], least: int, most: int) -> None:
    """Check that an option names at least one value, each once, and all within inclusive bounds.
    Raises `ValueError` that names the option, the rule and the value."""
    if not values:
        raise ValueError(f"`{option}` must name at least one, got none")
    if len(set(values)) != len(values):
        raise ValueError(f"`{option}` must name each once, got {' '.join(map(str, values))}")
    for value in values:
        if not least <= value <= most:
            raise ValueError(f"`{option}` must be from {least:,} to {most:,}, got {value}")


def check_size(option: str, **sizes: int) -> None:
    """Check that a tensor of these sizes fits some GPU. Raises `ValueError` that names the option,
    the sizes and the product."""
    product = 1
    for size in sizes.values():
        product *= size
    if product > LARGEST_TENSOR:
        raise ValueError(
            f"`{option}` must give {' x '.join(sizes)} of at most {LARGEST_TENSOR:,}, got "
            f"{' x '.join(map(str, sizes.values()))}"
        )


def check_commit(commit: str | None) -> None:
    """Check that a commit that is named by hand is one word, as it goes into a table's heading."""
    if commit is not None and not re.fullmatch(r"[!-~]{1,100}", commit):
        raise ValueError(f"`--commit` must be one word of 1 to 100 characters, got {shown(commit)}")


def check_output(folder: Path | None) -> None:
    """Check that results can be written to a folder, which may be new; raises `ValueError`."""
    if folder is None:
        return
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`--output` must be a folder, {folder} is a file")
    check_place("--output", folder)
