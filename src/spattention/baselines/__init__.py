"""Other people's sparse attention, as causal language models: what bands are compared with.

    from spattention.baselines import Longformer, apply, register

    apply(model, Longformer(num_heads=8, span=1024))  # in place, saved with the model
    register()  # before loading a model that was saved with a baseline

The band code knows nothing of them.
"""

from __future__ import annotations

from .adapter import Baseline, apply
from .adapter import register as _register
from .bigbird import BigBird
from .longformer import Longformer
from .published_masks import PublishedMask
from .reformer import Reformer
from .seen import seen

KINDS: tuple[type[Baseline], ...] = (Longformer, BigBird, Reformer, PublishedMask)

__all__ = ["KINDS", "Baseline", "BigBird", "Longformer", "PublishedMask", "Reformer", "apply"]
__all__ += ["register", "seen"]


def register() -> None:
    """Make every baseline known to Transformers, for this process. A second call does nothing."""
    for kind in KINDS:
        _register(kind)
