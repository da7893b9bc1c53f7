"""Sparse Patterned Attention: every head attends its own band of distances."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import hf as hf
    from . import parallel as parallel
    from .attention import band_attention, band_attention_varlen
    from .bands import BandPattern
    from .cache import BandStore
    from .cached_attention import band_attention_cached
    from .checks import validate
    from .explanation import Explanation, explain
    from .fitting import fit
    from .merging import merge

# Imported on first use: PyTorch takes seconds, which `spattention --help` does not need.
_MODULES = {
    "BandPattern": "bands",
    "BandStore": "cache",
    "band_attention": "attention",
    "band_attention_cached": "cached_attention",
    "band_attention_varlen": "attention",
    "Explanation": "explanation",
    "explain": "explanation",
    "fit": "fitting",
    "merge": "merging",
    "validate": "checks",
}
_SUBMODULES = ("hf", "parallel", "rings")

__version__ = "0.1.0"
__all__ = [
    "BandPattern",
    "BandStore",
    "Explanation",
    "band_attention",
    "band_attention_cached",
    "band_attention_varlen",
    "explain",
    "fit",
    "merge",
    "validate",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"spattention.{name}")
    if name in _MODULES:
        value = getattr(import_module(f"spattention.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
