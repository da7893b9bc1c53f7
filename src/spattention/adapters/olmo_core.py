"""Bands in models of OLMo-core 3.

from spattention.adapters import olmo_core

model = config.build()
olmo_core.apply(model, spa.BandPattern.shared_local(num_heads=16, span=4096))

OLMo-core's attention back ends are a closed list, so bands are put in after `build()`. A checkpoint
of OLMo-core holds weights alone: call `apply` in every script that builds the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, TypeVar

import torch

if find_spec("olmo_core") is None:
    raise ImportError(
        "`spattention.adapters.olmo_core` needs OLMo-core: install `spattention[olmo-core]`"
    )

from olmo_core.nn.attention import Attention
from olmo_core.nn.attention.backend import AttentionBackend

from ..attention import band_attention, band_attention_varlen
from ..bands import BandPattern
from .per_layer import per_layer

Model = TypeVar("Model", bound=torch.nn.Module)


def apply(model: Model, pattern: BandPattern | Sequence[BandPattern]) -> Model:
    """Give the attention layers of a model their bands, in place.

    Args:
        model: a `Transformer` of OLMo-core, as `TransformerConfig.build()` returns it, before
            anything wraps or compiles its blocks.
        pattern: one for all layers, or one per attention layer; `BandPattern.dense` for those that
            attend everything. Layers of another kind, such as recurrent ones, do not count.

    Returns:
        The same model. Documents are given by `doc_lens` and `max_doc_lens`, as for OLMo-core's
        own back ends; learned sinks of the layers stay.

    Raises:
        ValueError: if heads do not match, or a layer has dropout, a sliding window or keys and
            values split over ranks. The model is then as it was.
    """
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    patterns = per_layer(pattern, [layer.n_heads for layer in layers])
    for index, layer in enumerate(layers):
        _check(index, layer.backend)
    for layer, bands in zip(layers, patterns):
        layer.backend = BandBackend(bands, layer.backend)
    return model


def _check(layer: int, backend: AttentionBackend) -> None:
    if backend.dropout_p:
        raise ValueError(f"dropout of layer {layer} must be 0, got {backend.dropout_p}")
    if tuple(backend.window_size) != (-1, -1):
        raise ValueError(
            f"layer {layer} must have no sliding window, got {tuple(backend.window_size)}: build "
            "the model without, and give the layer BandPattern.sliding_window"
        )
    if backend.cp_enabled:
        raise ValueError(f"layer {layer} must not be under context parallelism")


class BandBackend(AttentionBackend):
    """OLMo-core's interface of an attention back end, over `band_attention`.

    Args:
        pattern: the bands, one entry per query head.
        replaced: the back end in whose place it stands, for sizes and scale.
    """

    def __init__(self, pattern: BandPattern, replaced: AttentionBackend):
        super().__init__(
            head_dim=replaced.head_dim,
            n_heads=replaced.n_heads,
            n_kv_heads=replaced.n_kv_heads,
            scale=replaced.scale,
        )
        self.pattern = pattern

    def extra_repr(self) -> str:
        """The pattern, for `print(model)`."""
        return f"pattern={self.pattern}"

    @classmethod
    def assert_supported(cls) -> None:
        """Do nothing: the operator runs on every device."""

    @classmethod
    def assert_supports_swa(cls) -> None:
        """Refuse OLMo-core's sliding windows."""
        raise RuntimeError(f"{cls.__name__} takes a window as a BandPattern, not as `window_size`")

    @classmethod
    def assert_supports_ring_cp(cls) -> None:
        """Refuse ring context parallelism."""
        raise RuntimeError(f"{cls.__name__} has no ring context parallelism")

    @classmethod
    def assert_supports_ulysses_cp(cls) -> None:
        """Refuse Ulysses' context parallelism."""
        raise RuntimeError(f"{cls.__name__} has no Ulysses context parallelism")

    @classmethod
    def assert_supports_packed_qkv(cls) -> None:
        """Refuse queries, keys and values in one tensor."""
        raise RuntimeError(f"{cls.__name__} takes query, key and value as three tensors")

    @classmethod
    def assert_supports_kv_cache(cls) -> None:
        """Refuse OLMo-core's cache for generation."""
        raise RuntimeError(f"{cls.__name__} has no cache: export the model to Transformers")

    def forward(
        self,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        *,
        cu_doc_lens: torch.Tensor | None = None,
        max_doc_len: int | None = None,
        sinks: torch.Tensor | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """Attend.

        Args:
            qkv: `[B, T, H, D]`, `[B, T, Hkv, D]`, `[B, T, Hkv, D]`.
            cu_doc_lens: int32 `[documents + 1]`, offsets of the documents in all B * T tokens.
            max_doc_len: tokens of the longest document.
            sinks: `[H]`, learned logits.
            others: arguments of OLMo-core's other back ends, which must be None here.

        Returns:
            `[B, T, H, D]`.
        """
        for name, value in others.items():
            if value is not None:
                raise ValueError(f"bands need `{name}` to be None, got {type(value).__name__}")
        if isinstance(qkv, torch.Tensor):
            self.assert_supports_packed_qkv()
        query, key, value = qkv
        if cu_doc_lens is None:
            out = band_attention(
                query.transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                self.pattern,
                scale=self.scale,
                sinks=sinks,
            )
            assert isinstance(out, torch.Tensor)
            return out.transpose(1, 2).contiguous()
        if max_doc_len is None:
            raise ValueError("`max_doc_len` must be given with `cu_doc_lens`, got None")
        out = band_attention_varlen(
            query.flatten(0, 1),
            key.flatten(0, 1),
            value.flatten(0, 1),
            self.pattern,
            cu_doc_lens,
            cu_doc_lens,
            max_doc_len,
            max_doc_len,
            scale=self.scale,
            sinks=sinks,
        )
        assert isinstance(out, torch.Tensor)
        return out.unflatten(0, query.shape[:2]).contiguous()
