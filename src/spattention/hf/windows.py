"""Sliding windows that layers have of their own, and trade for bands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..bands import BandPattern

# Model types whose attention differs in layers with a window by its mask alone, so that bands can
# take a window's place. Elsewhere more depends on it, such as rotary positions (Cohere 2, EXAONE 4)
# or the shape of projections (Gemma 4). A test reads the code of each of them again.
WINDOW_IS_ONLY_A_MASK = frozenset(
    {
        "beam",
        "cohere_compass_text",
        "cwm",
        "dots1",
        "gemma2",
        "gemma3_text",
        "gpt_oss",
        "granite_swa",
        "granitemoe_swa",
        "laguna",
        "lfm3",
        "mellum",
        "ministral",
        "ministral3",
        "mistral",
        "mixtral",
        "modernbert-decoder",
        "olmo3",
        "phi3",
        "phi4_multimodal",
        "phimoe",
        "qwen2",
        "qwen2_5_vl_text",
        "qwen2_moe",
        "qwen2_vl_text",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "starcoder2",
        "vaultgemma",
    }
)


def _window(config: Any, layer: int) -> int | None:
    """A layer's own sliding window in tokens, None if it attends everything."""
    types = getattr(config, "layer_types", None)
    if types is not None and types[layer] == "full_attention":
        return None
    window = getattr(config, "sliding_window", None)
    if window is not None and window < 1:
        raise ValueError(
            "`sliding_window` of the model's config must be at least 1, or None for attention "
            f"without a window, got {window}"
        )
    return window


def keeps_window(config: Any, layer: int, pattern: BandPattern) -> bool:
    """True if a layer stays as it is when nobody named it."""
    window = _window(config, layer)
    if window is None:
        return False
    # Where all layers share one window (Mistral's default is 4096), a span within it takes nothing
    # away from them.
    return getattr(config, "layer_types", None) is not None or window < pattern.span


def check_traded(config: Any, layer: int, pattern: BandPattern) -> None:
    """Check that a config which gives a layer bands has no sliding window there, as `apply` leaves
    it: Transformers makes masks and caches of a window that it finds.
    """
    window = _window(config, layer)
    if window is not None:
        raise ValueError(
            "`sliding_window` of a config must not reach layers with a pattern in "
            f"`config.spattention`, got {window} in layer {layer} with a span of {pattern.span}; "
            'set it to None, or "full_attention" for this layer in `layer_types`'
        )


def _replaced(config: Any, chosen: Sequence[BandPattern | None]) -> list[int]:
    """Layers that trade a sliding window for a pattern."""
    return [i for i, entry in enumerate(chosen) if entry and _window(config, i) is not None]


def check_windows(config: Any, chosen: Sequence[BandPattern | None]) -> None:
    """Check that `replace_windows` can do it; raise `ValueError` otherwise."""
    replaced = _replaced(config, chosen)
    if not replaced:
        return
    types = getattr(config, "layer_types", None)
    if types is None and len(replaced) != len(chosen):
        raise ValueError(
            "`pattern` must be given to all layers or none of a model whose one sliding window is "
            f"that of every layer, got {len(replaced)} of {len(chosen)}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(rope.get(kind), dict) for kind in set(types or ())):
        raise ValueError(
            "`pattern` must not replace a sliding window in a model whose positions are encoded "
            f"differently there, got layers {replaced}"
        )
    if config.model_type not in WINDOW_IS_ONLY_A_MASK:
        raise ValueError(
            f'`pattern` must not replace a sliding window in a model of type "{config.model_type}"'
            f", where more than the mask may depend on it, got layers {replaced}"
        )


def replace_windows(
    model: Any,
    configs: Sequence[Any],
    modules: dict[int, Any],
    chosen: Sequence[BandPattern | None],
) -> None:
    """Layers that trade a sliding window for a pattern count as full attention elsewhere."""
    replaced = _replaced(configs[0], chosen)
    if not replaced:
        return
    if getattr(configs[0], "layer_types", None) is None:
        for entry in configs:
            entry.sliding_window = None
        return
    for entry in configs:
        entry.layer_types = [
            "full_attention" if i in replaced else kind for i, kind in enumerate(entry.layer_types)
        ]
    for parent in model.modules():
        for child in parent.children():
            if any(child is modules[i] for i in replaced):
                for holder, name in ((parent, "attention_type"), (child, "layer_type")):
                    if hasattr(holder, name):
                        setattr(holder, name, "full_attention")
    for index in replaced:
        if hasattr(modules[index], "sliding_window"):
            modules[index].sliding_window = None
