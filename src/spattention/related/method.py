"""Parts that related systems share: bands in their section, causal attention, and their weights."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..attention import band_attention
from ..bands import BandPattern
from ..baselines.adapter import VERSION, Baseline, check_size
from ..hf.head_weights import masked_weights

EPS = 1e-5  # of the norm of a head


@dataclass(frozen=True)
class Related(Baseline):
    """A related system, in plain values that are saved with the model.

    Args:
        num_heads: query heads.
        span: context length in tokens that it is made for; longer inputs raise.
    """

    call: ClassVar[str] = "spattention.related.register()"

    @property
    def band_span(self) -> int:
        """Span of the bands that it takes."""
        return self.span

    def section(self) -> dict[str, Any]:
        """See `Baseline.section`; bands are saved as `BandPattern.to_dict` writes them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        bands = values.get("bands")
        if bands is not None:
            values["bands"] = bands.to_dict()
        return {"version": VERSION, **values}

    @classmethod
    def from_section(cls, section: Any) -> Self:
        """See `Baseline.from_section`."""
        if isinstance(section, dict) and section.get("bands") is not None:
            section = {**section, "bands": BandPattern.from_dict(section["bands"])}
        return super().from_section(section)


def check_bands(method: Related, bands: Any) -> None:
    """Heads and span of a system are in range, and its bands have those that it takes."""
    check_size(method)
    span = method.band_span
    if bands is None:
        return
    if not isinstance(bands, BandPattern):
        raise ValueError(f"`bands` of `{method.kind}` must be a BandPattern or None, got {bands!r}")
    if (bands.num_heads, bands.span) != (method.num_heads, span):
        raise ValueError(
            f"`bands` of `{method.kind}` must have {method.num_heads} heads and span {span}, got "
            f"{bands.num_heads} and {bands.span}"
        )


def check_number(kind: str, **values: tuple[Any, float, float]) -> None:
    """Each value is a number above the first that follows it, and at most the second."""
    for name, (value, above, most) in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"`{name}` of `{kind}` must be a number, got {value!r}")
        if not above < value <= most:
            raise ValueError(
                f"`{name}` of `{kind}` must be above {above:g} and at most {most:g}, got {value}"
            )


def check_whole(kind: str, query: Tensor, key: Tensor, reason: str) -> None:
    """Queries are those of a whole sequence; `reason` says why they must be."""
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"`query` must have as many tokens as `key` for {kind}, {key.shape[2]}, got "
            f"{query.shape[2]}: {reason}"
        )


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bands: BandPattern | None = None
) -> Tensor:
    """Softmax attention of the last Q positions, dense or within bands.

    Args:
        query: `[B, H, Q, D]`.
        key: `[B, Hkv, K, D]`; value alike.
        value: see key.
        scale: factor of the scores.
        bands: None for PyTorch's dense attention.
    """
    if bands is not None:
        out = band_attention(query, key, value, bands, scale=scale)
        assert isinstance(out, Tensor)  # no log-sum-exp was asked for
        return out
    queries, keys = query.shape[2], key.shape[2]
    mask = None
    if 1 < queries < keys:
        position = torch.arange(keys, device=query.device)
        mask = position <= position[keys - queries :, None]
    return scaled_dot_product_attention(
        query, key, value, mask, is_causal=queries == keys, scale=scale, enable_gqa=True
    )


def causal_weights(
    query: Tensor,
    key: Tensor,
    scale: float,
    start: int,
    stop: int,
    bands: BandPattern | None = None,
) -> Tensor:
    """The weights of `causal_attention`, as `LayerAttention.weights` returns them; empty rows are
    zero.
    """
    bands = BandPattern.dense(query.shape[1], key.shape[2]) if bands is None else bands
    mask = bands.mask(stop - start, key.shape[2], query_start=start, device=query.device)
    return masked_weights(query[:, :, start:stop], key, mask, scale)


def tokens_kept(bands: BandPattern | None) -> int | None:
    """Earlier tokens that a cache must keep for the next query; None: all of them."""
    if bands is None:
        return None
    return max(0, max((far for head in bands.intervals for _, far in head), default=0) - 1)


def causal_pairs(num_heads: int, seq_len: int, bands: BandPattern | None = None) -> int:
    """Attended pairs of all heads, dense or within bands."""
    if bands is not None:
        return sum(bands.pairs(seq_len))
    return num_heads * seq_len * (seq_len + 1) // 2


def norm_heads(out: Tensor, gain: Tensor) -> Tensor:
    """RMSNorm over the channels of each head `[..., d]`, in float32 or more; a row of zeros stays
    one.
    """
    work = out if out.dtype == torch.float64 else out.float()
    return torch.nn.functional.rms_norm(work, gain.shape, gain.to(work.dtype), EPS).to(out.dtype)
