"""Sparse Patterned Attention: every head attends its own band of distances."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import hf as hf
    from .attention import band_attention, band_attention_varlen
    from .bands import BandPattern
    from .cache import BandStore, band_attention_cached
    from .checks import validate
    from .merge import merge

# Imported on first use: PyTorch takes seconds, which `spattention --help` does not need.
_MODULES = {
    "BandPattern": "bands",
    "BandStore": "cache",
    "band_attention": "attention",
    "band_attention_cached": "cache",
    "band_attention_varlen": "attention",
    "merge": "merge",
    "validate": "checks",
}

__version__ = "0.1.0"
__all__ = [
    "BandPattern",
    "BandStore",
    "band_attention",
    "band_attention_cached",
    "band_attention_varlen",
    "merge",
    "validate",
]


class _Package(ModuleType):
    """The package, in which `merge` stays the function when the module `merge` is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing a module binds it in its package.
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name == "hf":
        return import_module("spattention.hf")
    if name in _MODULES:
        value = getattr(import_module(f"spattention.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
