"""Joining partial attention results over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Iterable

import torch

Partial = tuple[torch.Tensor, torch.Tensor]


def merge(parts: Iterable[Partial], *, sinks: torch.Tensor | None = None) -> Partial:
    """Attention over the union of the parts' keys, from each part's output and log-sum-exp.

    With `L = log(sum_i exp(lse_i) + exp(sink))`, the output is `sum_i exp(lse_i - L) * out_i`. The
    parts must see disjoint keys and be computed without sinks; the sinks join here, once.

    Args:
        parts: pairs `(out, lse)`, as `band_attention(..., return_lse=True)` returns them: `out [B,
            H, Q, D]` with `lse [B, H, Q]`, or packed `out [T, H, D]` with `lse [H, T]`.
        sinks: `[H]` learned logits, unscaled.

    Returns:
        `(out, lse)` of the same shapes and dtypes. A row that no part attends gives output 0 and
        lse = sink (-inf without sinks).

    Raises:
        ValueError: if there are no parts or their shapes do not fit.
    """
    parts = list(parts)
    if not parts:
        raise ValueError("`parts` must hold at least one (out, lse), got none")
    for part in parts:
        pair = isinstance(part, tuple | list) and len(part) == 2
        if not pair or not all(isinstance(each, torch.Tensor) for each in part):
            raise ValueError(f"`parts` must be pairs of tensors (out, lse), got {_described(part)}")
    outs, lses = [out for out, _ in parts], [lse for _, lse in parts]
    packed = outs[0].dim() == 3
    expected = outs[0].shape[:2][::-1] if packed else outs[0].shape[:3]
    heads = outs[0].shape[1]
    for out, lse in parts:
        if out.shape != outs[0].shape or lse.shape != expected:
            raise ValueError(
                f"`parts` must share one shape, out {tuple(outs[0].shape)} with lse "
                f"{tuple(expected)}, "
                f"got out {tuple(out.shape)} with lse {tuple(lse.shape)}"
            )
    if sinks is not None:
        if sinks.shape != (heads,):
            raise ValueError(f"`sinks` must be [H] = [{heads}], got {list(sinks.shape)}")
        rows = sinks.to(lses[0].dtype)[:, None]
        lses = [*lses, rows.expand(expected)]
    total = _logsumexp(torch.stack(lses))
    base = torch.where(total == -torch.inf, 0.0, total)
    merged = sum(
        _per_row(torch.exp(lse - base), packed) * out.to(lse.dtype) for out, lse in zip(outs, lses)
    )
    assert isinstance(merged, torch.Tensor)
    return merged.to(outs[0].dtype), total


def _described(part: object) -> str:
    """Types, not values: a tensor may be large."""
    if isinstance(part, tuple | list):
        return f"({', '.join(type(each).__name__ for each in part)})"
    return type(part).__name__


def _logsumexp(lses: torch.Tensor) -> torch.Tensor:
    """Over dimension 0; -inf where every entry is, with a gradient of zero there instead of NaN."""
    empty = (lses == -torch.inf).all(dim=0)
    return torch.where(empty, -torch.inf, torch.logsumexp(lses.masked_fill(empty, 0.0), dim=0))


def _per_row(weight: torch.Tensor, packed: bool) -> torch.Tensor:
    return (weight.transpose(0, 1) if packed else weight)[..., None]
