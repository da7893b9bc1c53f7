"""Captured attention: the share of a dense model's attention that a pattern keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..bands import BandPattern
from .profile import Profile


def captured(profile: Profile, patterns: Sequence[BandPattern]) -> Tensor:
    """The share of each head's attention on the keys that its pattern attends, `[L, H]`.

    A mean over the profile's queries, all positions alike. Its mean over heads is what `fit` makes
    large. Within a bin of distances the share is taken as even.

    Args:
        profile: of the dense model, or of the same model on other text.
        patterns: one per layer.

    Raises:
        ValueError: if the patterns are not those of the profile's layers and heads, or have a
            longer prefix than was measured.
    """
    check_patterns(profile, patterns)
    rows = []
    for layer, pattern in enumerate(patterns):
        prefix = pattern.prefix
        shares = profile.by_distance(prefix)[layer]
        inside = torch.stack([coverage(profile.edges, head) for head in pattern.intervals])
        start = profile.first[layer, :, :prefix].sum(dim=-1)
        attends = torch.tensor([bool(head) for head in pattern.intervals])
        rows.append((shares * inside).sum(dim=-1) + start * attends)
    return torch.stack(rows)


def coverage(edges: Sequence[int], intervals: Sequence[tuple[int, int]]) -> Tensor:
    """The part of each bin that lies within the intervals, from 0 to 1: float64 `[E]`."""
    bounds = torch.tensor(edges, dtype=torch.float64)
    low, high = bounds[:-1], bounds[1:]
    covered = torch.zeros(len(edges) - 1, dtype=torch.float64)
    for near, far in intervals:
        covered += (high.clamp(max=far) - low.clamp(min=near)).clamp(min=0)
    return covered / (high - low)


def check_patterns(profile: Profile, patterns: Sequence[BandPattern]) -> None:
    """Check that patterns are one per layer of the profile, with its heads."""
    if not isinstance(profile, Profile):
        raise ValueError(f"`profile` must be a Profile, got {type(profile).__name__}")
    layers, heads = profile.model.layers, profile.model.heads
    if not isinstance(patterns, Sequence) or len(patterns) != layers:
        given = len(patterns) if isinstance(patterns, Sequence) else type(patterns).__name__
        raise ValueError(f"`patterns` must be one per layer, {layers}, got {given}")
    for layer, pattern in enumerate(patterns):
        if not isinstance(pattern, BandPattern):
            raise ValueError(
                f"`patterns` must hold BandPattern, got {type(pattern).__name__} for layer {layer}"
            )
        if pattern.num_heads != heads:
            raise ValueError(
                f"`patterns` of layer {layer} has {pattern.num_heads} heads but the profile's "
                f"model has {heads}"
            )
        if pattern.prefix > profile.prefix_max:
            raise ValueError(
                f"`patterns` of layer {layer} has a prefix of {pattern.prefix} tokens but the "
                f"profile measured {profile.prefix_max}"
            )
