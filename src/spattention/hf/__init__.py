"""Hugging Face Transformers: bands in any causal language model.

spa.hf.apply(model, spa.BandPattern.shared_local(num_heads=16, span=4096))   # in place
spa.hf.register()                                                            # before loading a saved one
"""

from __future__ import annotations

try:
    import transformers as _transformers
except ImportError as error:
    raise ImportError("`spattention.hf` needs Transformers: install `spattention[hf]`") from error

from .attention import apply, register
from .config import NAME

__all__ = ["NAME", "apply", "register"]
