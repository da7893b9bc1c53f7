"""Systems that stand beside Sparse Patterned Attention, in models and alone or combined with bands.

    from spattention.related import MEA, apply, register

    apply(model, MEA(num_heads=8, span=1024))  # in place, saved with the model
    register()  # before loading a model that was saved with one of them

Each file names its source, and how far it can be faithful to it. The band code knows nothing of
them.
"""

from __future__ import annotations

from ..baselines.adapter import apply
from ..baselines.adapter import register as _register
from .cca import CCA
from .dga import DGA
from .elementwise import Elementwise
from .mea import MEA, fold
from .method import Related
from .recurrent_near import RecurrentNear, near_heads, recency_ratio
from .rrattention import RRAttention

KINDS: tuple[type[Related], ...] = (MEA, CCA, RRAttention, DGA, Elementwise, RecurrentNear)

__all__ = ["CCA", "DGA", "KINDS", "MEA", "Elementwise", "RRAttention", "Related", "apply", "fold"]
__all__ += ["RecurrentNear", "near_heads", "recency_ratio", "register"]


def register() -> None:
    """Make every related system known to Transformers, for this process. A second call does
    nothing.
    """
    for kind in KINDS:
        _register(kind)
