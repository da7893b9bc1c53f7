"""`.npy` files of one row of integers: their header is checked against their size."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..files import naming


def save_array(path: Path, array: np.ndarray) -> None:
    """Write one row, as `open_array` reads it."""
    with naming(path), path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


def open_array(path: Path, kinds: tuple[type[np.generic], ...]) -> np.ndarray:
    """The row in a file, of one of some dtypes, mapped into memory, not read.

    Raises:
        ValueError: if the file is missing, foreign, truncated, or claims another size than it has.
    """
    names = " or ".join(kind.__name__ for kind in kinds)
    if not path.is_file():
        raise ValueError(f"{path} must be a file with one row of {names}, it is none")
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"version {version} of the format")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        except Exception as error:  # NumPy parses the header as Python, which fails in many ways
            raise ValueError(f"{path} must be one row of {names} in .npy: {error}") from error
        offset = file.tell()
    if dtype not in kinds or len(shape) != 1 or fortran:
        raise ValueError(f"{path} must hold one row of {names}, got {dtype} {list(shape)}")
    size, expected = path.stat().st_size, offset + shape[0] * dtype.itemsize
    if size != expected:
        raise ValueError(f"{path} must have {expected} bytes by its header, got {size}")
    if not shape[0]:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r", offset=offset, shape=shape)
