"""Give the attention layers of a model their bands, in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..bands import BandPattern
from .conversion import convert
from .registration import register


def apply(
    model: Any,
    pattern: BandPattern | Sequence[BandPattern | None],
    *,
    layers: Iterable[int] | None = None,
    sinks: bool | float | Sequence[torch.Tensor | None] = False,
) -> Any:
    """Give the attention layers of a causal language model their bands, in place.

    Args:
        model: a Transformers causal language model, or a vision-language model, of which only the
            text decoder changes.
        pattern: one for all layers in question, or one per layer; None leaves that layer alone. Its
            heads are the layer's query heads, on all ranks where `tp_plan="auto"` distributed the
            weights: each rank attends with its part.
        layers: indices of the text layers in question; default all. With this default a single
            pattern leaves layers with a sliding window of their own alone (unless all share one
            window and the span lies within it); naming a layer, or giving it a pattern of its own,
            replaces its window.
        sinks: give each layer with a pattern a parameter `sinks [H]`: learned logits that join the
            softmax's denominator. True starts them at zero, and sinks that are there already keep
            their values. A number, or one tensor `[H]` per layer in question (None for a layer
            without a pattern), sets them; `spattention.fitting.starting_sinks` measures such.

    Returns:
        The same model. `config.spattention` describes what was done and is saved with the model.
        Layers left alone keep the implementation that the model had, "sdpa" or "eager" ("sdpa"
        after loading).

    Raises:
        ValueError: if the model is not causal, does not use Transformers' attention interface, caps
            its scores or returns attention weights, if heads do not match, if a layer cannot give
            up its sliding window, or has sinks of its own that `sinks` would replace, or if `sinks`
            are not finite or of another shape. The model is then as it was.
    """
    register()
    return convert(model, pattern, layers, sinks)
