"""Documents packed into rows: FlashAttention's offsets, and positions that restart."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from .config import NAME
from .mask import Rows

PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
WARNED = f"{NAME}_warned"  # mark of a module whose user was warned already


def check_packing(keywords: Mapping[str, Any], padded: bool) -> None:
    """Check that the offsets among some keywords come together, and without an `attention_mask`;
    raises `ValueError`."""
    missing = [name for name in PACKING if keywords.get(name) is None]
    if missing:
        raise ValueError(f"`{PACKING[0]}` must come with all of {PACKING[1:]}, got no {missing}")
    for name in PACKING[:2]:
        offsets = keywords[name]
        if not isinstance(offsets, torch.Tensor) or offsets.is_floating_point():
            kind = getattr(offsets, "dtype", type(offsets).__name__)
            raise ValueError(f"`{name}` must be a tensor of whole numbers, got {kind}")
    if padded:
        raise ValueError("`attention_mask` must be None with `cu_seq_lens_q`, got a padding mask")


def refuse_jumps(position_ids: torch.Tensor, advice: str) -> None:
    """Check that positions `[B, N]` go up by one or restart. Reads values; raises `ValueError` that
    ends with the advice."""
    jumps = (position_ids.diff(dim=1) > 1).nonzero()
    if len(jumps):
        row, column = jumps[0].tolist()
        before, after = position_ids[row, column : column + 2].tolist()
        raise ValueError(
            "`position_ids` must go up by one, or restart at a lower position where a packed "
            f"document starts, for spattention, got {before} then {after} in row {row}: {advice}"
        )


def warn_of_restarts(module: Any, position_ids: torch.Tensor, rows: Rows) -> None:
    """Warn once per module of positions that restart in a row with an `attention_mask`."""
    if not hasattr(module, WARNED) and _restarts(position_ids, rows):
        setattr(module, WARNED, True)
        warnings.warn(
            "`position_ids` restart in a row that comes with an `attention_mask`. As in "
            "Transformers, its documents then see one another: to keep them apart, leave the "
            "`attention_mask` out",
            stacklevel=3,
        )


def _restarts(position_ids: torch.Tensor, rows: Rows) -> bool:
    """True if positions fall from one token to the next; padding may have any position."""
    falls = position_ids.diff(dim=1) <= 0
    valid = rows.valid_queries(position_ids.shape[1])
    if valid is not None:
        falls = falls & valid[:, 1:] & valid[:, :-1]
    return bool(falls.any())
