"""What a model hands its attention layers in place of a mask: the first visible key of each row or
query.

Transformers builds one mask per forward pass and passes any 4-D tensor on untouched, so the rows
travel as a small int32 tensor `[B, 1, R, C]`, never as Q x K:

    R = 1       one entry per row of the batch (padding)
    R = Q       one per query (documents packed inside a row)
    column 0    the first key that may be seen, as an index into the keys at hand
    column 1    the position of the first query among the keys; only there when the queries are not
                the last keys, as in a static cache
    column 2    always 0; only there beside column 1, when an `attention_mask` was given

None stands for rows whose queries are the last keys, without an `attention_mask`. Whether one was
given must show in the shape, on every device and whatever its values: `position_ids` split a row
only if it was not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function

from ..checks import readable

MaskFunction = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Rows:
    """`key_start` and `query_start` as `spattention.band_attention` takes them.

    Attributes:
        key_start: int32 `[B]` or `[B, Q]`; None: every key may be seen.
        query_start: int32 `[]`; None: the queries are the last keys.
        padded: whether an `attention_mask` was given, even one without padding.
    """

    key_start: torch.Tensor | None = None
    query_start: torch.Tensor | None = None
    padded: bool = False

    @property
    def plain(self) -> bool:
        return self.key_start is None and self.query_start is None


def rows_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    *,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> torch.Tensor | None:
    """The mask function of `attn_implementation="spattention"`; arguments are those of
    Transformers' mask interface.

    Args:
        batch_size: rows B.
        q_length: queries Q.
        kv_length: keys at hand K; for a static cache all that it can hold.
        q_offset: position of the first query; a 0-d tensor for a static cache.
        kv_offset: position of the first key at hand; above 0 in the cache of a sliding window.
        mask_function: Transformers' rule of who sees whom, by index; it knows about documents
            packed inside a row.
        attention_mask: the 2-D mask of padding, bool `[B, positions so far]`.
        use_vmap: True when the caller combined the rule with one of its own.
        device: where the result goes.
        others: what only other implementations need: dtype, config, local_size, and permissions to
            skip the mask.

    Raises:
        ValueError: for a rule that is not causal or was combined with another; on the CPU, outside
            `torch.compile`, also for a padding mask with holes. Elsewhere values are not read: a
            hole is then seen as a valid token.
    """
    if "allow_is_bidirectional_skip" in others:
        raise ValueError("the model must be causal for spattention, got a bidirectional mask")
    if use_vmap or getattr(mask_function, "__name__", "") == "or_mask":
        raise ValueError(
            "the model's mask must be causal with padding at the ends of rows or packed documents "
            "for spattention, got one with an added rule (such as bidirectional image tokens)"
        )
    key_start = None
    if attention_mask is not None:
        key_start = _first_valid(attention_mask, kv_offset, device)
    elif mask_function is not causal_mask_function and q_length > 1 and q_length == kv_length:
        key_start = _first_of_document(mask_function, batch_size, q_length, device)
    if isinstance(q_offset, int) and q_offset - kv_offset == kv_length - q_length:
        query_start = None
    else:
        query_start = torch.as_tensor(q_offset - kv_offset, device=device)
    padded = attention_mask is not None
    return _encode(Rows(key_start, query_start, padded), batch_size, device)


def add_restarts(
    mask: torch.Tensor | None, position_ids: torch.Tensor, batch_size: int, key_len: int
) -> torch.Tensor | None:
    """The same rows, further split wherever `position_ids [1 or B, Q]` do not go up by one.

    Rows that come with an `attention_mask` stay as they are, as in Transformers.
    """
    rows = decode(mask)
    if rows.padded:
        return mask
    query_len = position_ids.shape[1]
    jumps = position_ids.diff(dim=1) != 1
    if readable(jumps) and not bool(jumps.any()):
        return mask
    start: int | torch.Tensor = key_len - query_len
    if rows.query_start is not None:
        start = rows.query_start
    key_start = _last_true(jumps, start, start)
    # The first document of the row may reach back to keys before these queries.
    first = torch.zeros_like(key_start[:, :1]) if rows.key_start is None else rows.key_start
    first = first[:, None] if first.dim() == 1 else first
    key_start = torch.where(key_start == start, first, torch.maximum(key_start, first))
    split = Rows(key_start.expand(batch_size, -1), rows.query_start)
    return _encode(split, batch_size, position_ids.device)


def is_packed(before: torch.Tensor | None, after: torch.Tensor | None) -> bool:
    """Whether `add_restarts` found more documents than the one that padding leaves in each row.
    Reads values.
    """
    last = decode(after).key_start
    if last is None or last.dim() == 1:
        return False
    first = decode(before).key_start
    return bool((last[:, -1] > (0 if first is None else first)).any())


def decode(mask: torch.Tensor | None) -> Rows:
    """Read what `rows_mask` wrote; raises `ValueError` for any other 4-D mask."""
    if mask is None:
        return Rows()
    if mask.dtype != torch.int32 or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[3] > 3:
        raise ValueError(
            "`attention_mask` must be None or a 2-D padding mask for spattention, whose bands take "
            f"the place of a 4-D mask, got shape {list(mask.shape)} of {mask.dtype}"
        )
    key_start, columns = mask[:, 0, :, 0], mask.shape[3]
    by_row = mask.shape[2] == 1
    return Rows(
        key_start=key_start[:, 0] if by_row else key_start,
        query_start=mask[0, 0, 0, 1] if columns > 1 else None,
        padded=columns == 3 or (by_row and columns == 1),
    )


def dense_mask(
    rows: Rows, query_len: int, key_len: int, window: int | None, device: torch.device
) -> torch.Tensor:
    """The causal mask of a layer that keeps its own attention, bool `[B or 1, 1, Q, K]`.

    Args:
        rows: of this forward pass.
        query_len: Q.
        key_len: K.
        window: the layer's own sliding window in tokens, itself included.
        device: of the mask.
    """
    start = key_len - query_len if rows.query_start is None else rows.query_start
    positions = (start + torch.arange(query_len, device=device))[:, None]
    keys = torch.arange(key_len, device=device)
    mask = (keys <= positions)[None]
    if window is not None:
        mask = mask & (keys > positions - window)
    if rows.key_start is not None:
        first = rows.key_start if rows.key_start.dim() == 2 else rows.key_start[:, None]
        mask = mask & (keys >= first[:, :, None])
    return mask[:, None]


def _encode(rows: Rows, batch_size: int, device: torch.device | str) -> torch.Tensor | None:
    key_start = rows.key_start
    if key_start is not None and not rows.padded and readable(key_start) and not key_start.any():
        key_start = None  # one document per row
    if key_start is None:
        if rows.query_start is None:
            return None
        key_start = torch.zeros(batch_size, dtype=torch.int32, device=device)
    column = key_start.to(torch.int32).reshape(batch_size, 1, -1, 1)
    if rows.query_start is None:
        return column
    columns = [column, rows.query_start.to(torch.int32).expand_as(column)]
    if rows.padded:
        columns.append(torch.zeros_like(column))
    return torch.cat(columns, dim=-1)


def _first_valid(mask: torch.Tensor, kv_offset: int, device: torch.device | str) -> torch.Tensor:
    """Index of each row's first valid key, `[B]`; a row without one, such as a chunk of left
    padding, hides all its keys."""
    if mask.dim() != 2:
        raise ValueError(
            "`attention_mask` must be a 2-D padding mask for spattention, got shape "
            f"{list(mask.shape)}"
        )
    valid = mask.to(device=device, dtype=torch.int32)
    if readable(valid):
        runs = valid[:, 0] + (valid.diff(dim=1) == 1).sum(dim=1)
        if bool((runs > 1).any()):
            row = int((runs > 1).nonzero()[0])
            raise ValueError(
                "`attention_mask` must be ones with zeros only at the ends of a row for "
                f"spattention, got a hole in row {row}"
            )
    first = torch.where(valid.any(dim=1), valid.argmax(dim=1), valid.shape[1])
    return (first - kv_offset).clamp(min=0)


def _first_of_document(
    mask_function: MaskFunction, batch_size: int, query_len: int, device: torch.device | str
) -> torch.Tensor:
    """Index of the first token of each token's document, `[B, Q]`: where a token does not see the
    one before it.
    """
    rows = torch.arange(batch_size, device=device)[:, None]
    tokens = torch.arange(1, query_len, device=device)[None]
    head = torch.zeros_like(rows)
    if readable(rows) and bool(mask_function(rows, head, tokens - 1, tokens).any()):
        raise ValueError(
            "the model must be causal for spattention, got a mask that sees later tokens"
        )
    starts = ~mask_function(rows, head, tokens, tokens - 1)
    return _last_true(starts.expand(batch_size, -1), 0, 0)


def _last_true(
    starts: torch.Tensor, first: int | torch.Tensor, offset: int | torch.Tensor
) -> torch.Tensor:
    """Running position of the latest start: bool `[B, Q - 1]` of tokens 1.. to int `[B, Q]`,
    `first` before any.
    """
    tokens = torch.arange(1, starts.shape[1] + 1, device=starts.device) + offset
    latest = torch.where(starts, tokens, first).cummax(dim=1).values
    return torch.nn.functional.pad(latest - first, (1, 0)) + first
