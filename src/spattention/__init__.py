"""Sparse Patterned Attention: every head attends its own band of distances."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .attention import band_attention, band_attention_varlen
from .bands import BandPattern
from .cache import BandStore, band_attention_cached
from .checks import validate
from .explanation import Explanation, explain
from .merge import merge

if TYPE_CHECKING:
    from . import hf as hf

__version__ = "0.1.0"
__all__ = [
    "BandPattern",
    "BandStore",
    "Explanation",
    "band_attention",
    "band_attention_cached",
    "band_attention_varlen",
    "explain",
    "merge",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name == "hf":
        return import_module("spattention.hf")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
