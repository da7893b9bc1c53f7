"""Every benchmark imports, whether or not another test runs it."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import benchmarks

MODULES = [
    each.name
    for each in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")
    if not each.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_a_benchmark_imports(name: str) -> None:
    """Its own modules and names are there; other packages may be missing."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("benchmarks", "spattention"):
            raise
        pytest.skip(f"needs {error.name}")
