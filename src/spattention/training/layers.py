"""The attention of a recipe: one for all layers, or one per layer, with or without sinks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from .. import hf
from ..bands import BandPattern
from ..choice import (
    STOCK,
    AttentionChoice,
    DenseAttention,
    attention_choice,
    is_other,
    named_pattern,
)


@dataclass(frozen=True)
class Layered:
    """An `AttentionChoice` with a pattern for each layer; None is stock dense attention."""

    name: str
    patterns: tuple[BandPattern | None, ...]
    sinks: bool
    num_heads: int

    def apply(self, model: PreTrainedModel) -> None:
        if any(self.patterns):
            hf.apply(model, self.patterns, sinks=self.sinks)
        else:
            DenseAttention(self.num_heads).apply(model)

    def pairs(self, seq_len: int) -> int:
        """Attended pairs per window, the mean over layers."""
        dense = self.num_heads * seq_len * (seq_len + 1) // 2
        total = sum(dense if p is None else sum(p.pairs(seq_len)) for p in self.patterns)
        return round(total / len(self.patterns))


def is_stock(named: str | Sequence[str]) -> bool:
    """True if a recipe's attention is dense in every layer."""
    return {STOCK} == ({named} if isinstance(named, str) else set(named))


def recipe_attention(
    named: str | Sequence[str],
    num_layers: int,
    num_heads: int,
    span: int,
    *,
    sinks: bool = False,
    all_bands: bool = False,
) -> AttentionChoice:
    """The attention that a recipe names.

    Args:
        named: as `choice.attention_choice` reads it, or a list of these with one per layer.
        num_layers: decoder layers of the model.
        num_heads: its query heads.
        span: context length in tokens.
        sinks: whether layers with a pattern have attention sinks.
        all_bands: whether dense layers run as a band of all distances, not as stock attention, so
            that another pattern can replace it.

    Raises:
        ValueError: if a name is not known, their number is not that of the layers, or there is no
            pattern for the sinks.
    """
    if isinstance(named, str) and not sinks and not all_bands:
        return attention_choice(named, num_heads, span)
    names = (named,) * num_layers if isinstance(named, str) else tuple(named)
    if len(names) != num_layers:
        raise ValueError(
            f"`attention` must name one for all or one for each of {num_layers} layers, got "
            f"{len(names)}"
        )
    for name in names:
        if is_other(name):
            raise ValueError(
                f"`attention` must be dense or a pattern for single layers or sinks, and {name} is "
                "another attention, for a whole model without them"
            )
    patterns = tuple(
        None if n == STOCK and not all_bands else named_pattern(n, num_heads, span) for n in names
    )
    if sinks and not any(patterns):
        raise ValueError("`sinks` must be false where every layer is dense, got true")
    label = named if isinstance(named, str) else "+".join(dict.fromkeys(names))
    return Layered(f"{label} with sinks" if sinks else label, patterns, sinks, num_heads)
