"""Sparse Patterned Attention: every head attends its own band of distances."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .attention import band_attention, band_attention_varlen
from .bands import BandPattern
from .cache import BandStore
from .cached_attention import band_attention_cached
from .checks import validate
from .merge import merge

if TYPE_CHECKING:
    from . import hf as hf

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


def __getattr__(name: str) -> Any:
    if name in ("hf", "rings"):
        return import_module(f"spattention.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
