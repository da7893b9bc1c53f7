"""Hugging Face Transformers: bands in any causal language model.

spa.hf.apply(model, spa.BandPattern.shared_local(num_heads=16, span=4096))  # in place
spa.hf.register()  # before loading a model that was saved with bands
"""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("transformers") is None:
    raise ImportError("`spattention.hf` needs Transformers: install `spattention[hf]`")

from .apply import apply, register
from .cache import BandCache
from .cache_guard import trust_cache
from .config import NAME
from .context_parallel import context_parallel
from .loader import add_loader
from .profile import profile
from .running import patterns
from .tensor_parallel import deal

__all__ = [
    "NAME",
    "BandCache",
    "add_loader",
    "apply",
    "context_parallel",
    "deal",
    "patterns",
    "profile",
    "register",
    "trust_cache",
]
