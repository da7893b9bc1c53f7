"""Patterns fitted to a dense model: profiles of what its heads attend, and `fit`.

    profile = spa.hf.profile(model, batches)
    patterns = spa.fit(profile, pairs=0.35)       # one BandPattern per layer
    print(explain(profile, patterns))
    spa.hf.apply(model, patterns)

Nothing here needs Transformers.
"""

from __future__ import annotations

from .capture import captured
from .explain import explain
from .fit import fit, sliding_window
from .profile import ModelIdentity, Profile
from .sinks import starting_sinks

__all__ = [
    "ModelIdentity",
    "Profile",
    "captured",
    "explain",
    "fit",
    "sliding_window",
    "starting_sinks",
]
