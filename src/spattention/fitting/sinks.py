"""Starting values of learned sinks: the share of attention that the first tokens had."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..bands import BandPattern
from .capture import check_patterns
from .profile import Profile

UNUSED = 10.0  # below the first tokens' score: a sink of a head that still sees them
NOTICED = 0.01  # share of attention of a first token that counts


def starting_sinks(profile: Profile, patterns: Sequence[BandPattern]) -> list[Tensor]:
    """Sinks `[H]` per layer, for `hf.apply(sinks=...)`, that replace the first tokens of a text.

    A sink takes the share of attention that first tokens had, which bands reach only by distance.
    Heads that still see them, by a prefix or because they attend everything, start with a sink that
    takes next to nothing.

    Args:
        profile: of the dense model.
        patterns: one per layer.

    Raises:
        ValueError: if the patterns are not those of the profile's layers and heads.
    """
    check_patterns(profile, patterns)
    starts = first_scores(profile)
    found = []
    for layer, pattern in enumerate(patterns):
        whole = ((0, pattern.span),)
        sees = torch.tensor([pattern.prefix > 0 or h == whole for h in pattern.intervals])
        found.append((starts[layer] - UNUSED * sees).float())
    return found


def first_scores(profile: Profile) -> Tensor:
    """Log of what the first tokens add to a softmax, `[L, H]`.

    It is the log-sum-exp of the mean scores of those first tokens that hold a share of at least one
    in a hundred; without any, the mean score of the first token with the largest share.
    """
    best = profile.first == profile.first.amax(dim=-1, keepdim=True)
    kept = (profile.first >= NOTICED) | best
    return profile.first_logits.masked_fill(~kept, -math.inf).logsumexp(dim=-1)
