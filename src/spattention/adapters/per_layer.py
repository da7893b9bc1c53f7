"""One pattern, or one for each layer, as the adapters take them."""

from __future__ import annotations

from collections.abc import Sequence

from ..bands import BandPattern


def per_layer(pattern: BandPattern | Sequence[BandPattern], heads: list[int]) -> list[BandPattern]:
    """The pattern of each layer, checked against the layers' numbers of query heads.

    Raises:
        ValueError: if there are no layers, or if patterns or their heads do not match.
    """
    if not heads:
        raise ValueError("`model` must have attention layers that can take bands, got none")
    patterns = [pattern] * len(heads) if isinstance(pattern, BandPattern) else list(pattern)
    if len(patterns) != len(heads):
        raise ValueError(f"`pattern` has {len(patterns)} entries but `model` has {len(heads)}")
    for layer, (each, count) in enumerate(zip(patterns, heads)):
        if not isinstance(each, BandPattern):
            raise ValueError(f"`pattern` of layer {layer} must be a BandPattern, got {each!r}")
        if each.num_heads != count:
            raise ValueError(
                f"`pattern` has {each.num_heads} heads but layer {layer} of `model` has {count}"
            )
    return patterns
