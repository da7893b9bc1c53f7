"""Bands in models of torchtitan.

from spattention.adapters import torchtitan

config = llama3_8b()  # a torchtitan `Trainer.Config`, as in its config registries
torchtitan.apply(config.model_spec.model, spa.BandPattern.shared_local(num_heads=32, span=8192))

The inner attention of each layer is a part of the model's config, and is replaced there before the
model is built. Documents come from `positions`, as for torchtitan's own variable-length attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

import torch

if find_spec("torchtitan") is None:
    raise ImportError(
        "`spattention.adapters.torchtitan` needs torchtitan: install `spattention[torchtitan]`"
    )

from torchtitan.models.common.attention import (
    BaseAttention,
    FlexAttention,
    GQAttention,
    VarlenAttention,
    VarlenMetadata,
)
from torchtitan.protocols.module import Module

from ..attention import band_attention, band_attention_varlen
from ..bands import BandPattern
from .per_layer import per_layer

Config = TypeVar("Config")


def apply(config: Config, pattern: BandPattern | Sequence[BandPattern]) -> Config:
    """Give the attention layers of a model's config their bands, in place.

    Args:
        config: the config of a decoder, such as `Llama3Model.Config`, before `build()`.
        pattern: one for all layers, or one per attention layer; `BandPattern.dense` for those that
            attend everything.

    Returns:
        The same config.

    Raises:
        ValueError: if heads do not match, if a layer is not `GQAttention`, or if its inner
            attention is neither flex nor variable-length without a window. The config is then as
            it was.
    """
    layers = [found for _, found, _, _ in config.traverse(BaseAttention.Config)]  # type: ignore[attr-defined]
    patterns = per_layer(pattern, [layer.n_heads for layer in layers])
    for index, layer in enumerate(layers):
        _check(index, layer)
    for layer, bands in zip(layers, patterns):
        layer.inner_attention = BandAttention.Config(pattern=bands)
    return config


def _check(layer: int, config: Any) -> None:
    inner = config.inner_attention
    if not isinstance(config, GQAttention.Config):
        raise ValueError(
            f"the attention of layer {layer} must be GQAttention, got {type(config).__qualname__}"
        )
    if not isinstance(inner, (FlexAttention.Config, VarlenAttention.Config)):
        raise ValueError(
            f"the inner attention of layer {layer} must be FlexAttention or VarlenAttention, got "
            f"{type(inner).__qualname__}"
        )
    if isinstance(inner, VarlenAttention.Config) and inner.window_size != (-1, 0):
        raise ValueError(
            f"layer {layer} must have no sliding window, got {inner.window_size}: give it "
            "BandPattern.sliding_window"
        )


class BandAttention(Module):
    """torchtitan's interface of an inner attention, over `band_attention`."""

    # Derived from the variable-length attention's, so that models build its document offsets.
    @dataclass(kw_only=True, slots=True)
    class Config(VarlenAttention.Config):
        """The bands of a layer, one entry per query head."""

        pattern: BandPattern

    def __init__(self, config: Config):
        super().__init__()
        self.pattern = config.pattern

    def forward(
        self,
        q_BLNH: torch.Tensor,
        k_BLNH: torch.Tensor,
        v_BLNH: torch.Tensor,
        *,
        attention_masks: VarlenMetadata | None = None,
        scale: float | None = None,
        out_transform: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Attend.

        Args:
            q_BLNH: `[B, L, H, D]`.
            k_BLNH: `[B, L, Hkv, D]`.
            v_BLNH: `[B, L, Hkv, Dv]`.
            attention_masks: offsets of the documents in all B * L tokens; None for one a row.
            scale: factor of the scores; default `1 / sqrt(D)`.
            out_transform: a function of the output and its log-sum-exp `[B, L, H]`.
            enable_gqa: ignored: grouped heads are told by the shapes.

        Returns:
            `[B, L, H, Dv]`.
        """
        if attention_masks is None:
            found = band_attention(
                q_BLNH.transpose(1, 2),
                k_BLNH.transpose(1, 2),
                v_BLNH.transpose(1, 2),
                self.pattern,
                scale=scale,
                return_lse=True,
            )
            out, lse = (each.transpose(1, 2) for each in found)
        else:
            if not isinstance(attention_masks, VarlenMetadata):
                raise ValueError(
                    "`attention_masks` must be VarlenMetadata or None, got "
                    f"{type(attention_masks).__name__}"
                )
            out, lse = band_attention_varlen(
                q_BLNH.flatten(0, 1),
                k_BLNH.flatten(0, 1),
                v_BLNH.flatten(0, 1),
                self.pattern,
                attention_masks.cu_seq_q,
                attention_masks.cu_seq_k,
                attention_masks.max_q,
                attention_masks.max_k,
                scale=scale,
                return_lse=True,
            )
            out = out.unflatten(0, q_BLNH.shape[:2])
            lse = lse.transpose(0, 1).unflatten(0, q_BLNH.shape[:2])
        return out if out_transform is None else out_transform(out, lse)
