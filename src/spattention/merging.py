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
        ValueError: if there are no parts, or their shapes, dtypes or devices do not fit.
    """
    pairs = _checked(parts)
    outs, lses = [out for out, _ in pairs], [lse for _, lse in pairs]
    packed = outs[0].dim() == 3
    if sinks is not None:
        _check_sinks(sinks, outs[0])
        rows = sinks.to(lses[0].dtype)[:, None]
        lses = [*lses, rows.expand(lses[0].shape)]
    total = _logsumexp(torch.stack(lses))
    base = torch.where(total == -torch.inf, 0.0, total)
    merged = sum(
        _per_row(torch.exp(lse - base), packed) * out.to(lse.dtype) for out, lse in zip(outs, lses)
    )
    assert isinstance(merged, torch.Tensor)
    return merged.to(outs[0].dtype), total


def _checked(parts: Iterable[Partial]) -> list[Partial]:
    """The parts as a list; raises `ValueError` unless they fit together."""
    if isinstance(parts, torch.Tensor) or not isinstance(parts, Iterable):
        raise ValueError(f"`parts` must be pairs of tensors (out, lse), got {_described(parts)}")
    pairs = list(parts)
    if not pairs:
        raise ValueError("`parts` must hold at least one (out, lse), got none")
    for part in pairs:
        pair = isinstance(part, tuple | list) and len(part) == 2
        if not pair or not all(isinstance(each, torch.Tensor) for each in part):
            raise ValueError(f"`parts` must be pairs of tensors (out, lse), got {_described(part)}")
        for tensor in part:
            _check_dense("parts", tensor)
    first, first_lse = pairs[0]
    if first.dim() not in (3, 4):
        raise ValueError(
            f"`parts` must hold out [B, H, Q, D] or [T, H, D], got shape {list(first.shape)}"
        )
    expected = first.shape[:2][::-1] if first.dim() == 3 else first.shape[:3]
    for out, lse in pairs:
        if out.shape != first.shape or lse.shape != expected:
            raise ValueError(
                f"`parts` must share one shape, out {tuple(first.shape)} with lse "
                f"{tuple(expected)}, got out {tuple(out.shape)} with lse {tuple(lse.shape)}"
            )
        if not (out.is_floating_point() and lse.is_floating_point()):
            raise ValueError(
                f"`parts` must be floating point, got out {out.dtype} with lse {lse.dtype}"
            )
        if out.dtype != first.dtype or lse.dtype != first_lse.dtype:
            raise ValueError(
                f"`parts` must share one dtype, out {first.dtype} with lse {first_lse.dtype}, got "
                f"out {out.dtype} with lse {lse.dtype}"
            )
        if out.device != first.device or lse.device != first.device:
            raise ValueError(
                f"`parts` must be on one device, {first.device}, got out on {out.device} with lse "
                f"on {lse.device}"
            )
    return pairs


def _check_dense(name: str, tensor: torch.Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested one" if tensor.is_nested else f"layout {tensor.layout}"
        raise ValueError(f"`{name}` must hold dense tensors, got {kind}")


def _check_sinks(sinks: torch.Tensor, out: torch.Tensor) -> None:
    if not isinstance(sinks, torch.Tensor):
        raise ValueError(f"`sinks` must be a tensor, got {type(sinks).__name__}")
    _check_dense("sinks", sinks)
    if sinks.shape != (out.shape[1],):
        raise ValueError(f"`sinks` must be [H] = [{out.shape[1]}], got {list(sinks.shape)}")
    if not sinks.is_floating_point():
        raise ValueError(f"`sinks` must be floating point, got {sinks.dtype}")
    if sinks.device != out.device:
        raise ValueError(f"`sinks` must be on the parts' device {out.device}, got {sinks.device}")


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
