"""The numbers that a model hands its attention layers in place of a mask: the first visible key of
each row or query, and, if padding is between tokens, the columns of the tokens.

Transformers builds one mask per forward pass and passes any 4-D tensor on untouched. So the rows
travel as a small int32 tensor `[B, P, R, C]`, never as Q x K. It has up to three planes P:

    plane 0     R = 1   the numbers below, one set per row of the batch
                R = Q   one set per query (documents packed inside a row)
    plane 1     R = n   1 for a token and 0 for padding, by column; present if a query is padding,
                        or padding is between tokens
    plane 2     R = n   the column of the key that comes to each place once all padding has moved
                        to the left end; present if padding is between tokens

and up to three columns C:

    column 0    the first key that may be seen, as an index into the keys; with plane 2, an index
                into the keys once padding has moved
    column 1    the position of the first query among the keys; present if the queries are not the
                last keys, as in a static cache
    column 2    the number of tokens before the first query; present next to column 1, if an
                `attention_mask` was given

With more than one plane, the numbers of plane 0 repeat along R, and those of the others along C.
None stands for rows whose queries are the last keys, without an `attention_mask`. Whether one was
given shows in the shape, on every device and whatever its values: `position_ids` split a row only
if it was not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function

from ..checks import in_graph, readable
from ..compat.pytorch import is_batched
from ..padding import padding_first
from .config import read_section

MaskFunction = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Rows:
    """`key_start` and `query_start` as `spattention.band_attention` takes them, and padding.

    Attributes:
        key_start: int32 `[B]` or `[B, Q]`; None: every key may be seen. With `source`, of the keys
            in that order.
        query_start: int32 `[]`; None: the queries are the last keys.
        padded: whether an `attention_mask` was given, even one without padding.
        valid: bool `[B, n]`, False for padding, by column of the keys, or of the queries alone
            where n = Q; None: all queries are tokens, and padding comes before them alone.
        source: int `[B, K]`, the column of the key that comes to each place once all padding has
            moved to the left end; None: no padding is between tokens.
        before: int32 `[B]`, tokens before the first query; None: not known.
    """

    key_start: torch.Tensor | None = None
    query_start: torch.Tensor | None = None
    padded: bool = False
    valid: torch.Tensor | None = None
    source: torch.Tensor | None = None
    before: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        return self.key_start is None and self.query_start is None and self.valid is None

    def valid_queries(self, query_len: int) -> torch.Tensor | None:
        """bool `[B, Q]`, False for a query that is padding; None if none is."""
        if self.valid is None or self.valid.shape[1] == query_len:
            return self.valid
        if self.query_start is None:
            return self.valid[:, -query_len:]
        return _columns(self.valid, self.query_start, query_len)


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
    """The mask function of `attn_implementation="spattention"`, with the arguments of
    Transformers' mask interface.

    Padding may be anywhere. Once per forward pass the mask is read for padding between tokens, as
    Transformers reads it for its own masks. Where values cannot be read (`torch.compile`, the
    capture of a CUDA graph), layers move keys and values in any case.

    Args:
        batch_size: rows B.
        q_length: queries Q.
        kv_length: number of keys K; for a static cache all that it can hold; a 0-d tensor for a
            `BandCache`.
        q_offset: position of the first query; a 0-d tensor for a static cache.
        kv_offset: position of the first key; above 0 in the cache of a sliding window.
        mask_function: Transformers' rule of who sees whom, by index; it knows about documents
            packed inside a row.
        attention_mask: the 2-D mask of padding, `[B, positions so far]`.
        use_vmap: True when the caller combined the rule with one of its own.
        device: where the result goes.
        others: the model's config, and arguments that only other implementations need (dtype,
            local_size, permissions to skip the mask).

    Raises:
        ValueError: for a rule that is not causal or was combined with another, or a mask that is
            not 2-D or does not cover all tokens so far.
    """
    if "allow_is_bidirectional_skip" in others:
        raise ValueError("the model must be causal for spattention, got a bidirectional mask")
    if use_vmap or getattr(mask_function, "__name__", "") == "or_mask":
        raise ValueError(
            "the model's mask must be causal with padding or packed documents for spattention, got "
            "one with an added rule (such as bidirectional image tokens)"
        )
    query_start: int | torch.Tensor = q_offset - kv_offset
    if isinstance(query_start, int) and query_start == kv_length - q_length:
        start = None
    else:
        start = torch.as_tensor(query_start, device=device)
    if attention_mask is not None:
        check_padding(attention_mask, batch_size, q_offset, q_length)
        valid = attention_mask.to(device=device, dtype=torch.bool)
        if isinstance(kv_length, torch.Tensor) and _all_have_bands(others.get("config")):
            rows = _new_padding(valid, q_offset, q_length)
        else:
            keys = valid.shape[1] if isinstance(kv_length, torch.Tensor) else kv_length
            valid = _columns(valid, kv_offset, keys)
            rows = _padding(valid, query_start, q_length)
        return _encode(replace(rows, query_start=start), batch_size, device)
    key_start = None
    if mask_function is not causal_mask_function and q_length > 1 and q_length == kv_length:
        key_start = _first_of_document(mask_function, batch_size, q_length, device)
    return _encode(Rows(key_start, start), batch_size, device)


def add_restarts(
    mask: torch.Tensor | None, position_ids: torch.Tensor, batch_size: int, key_len: int
) -> torch.Tensor | None:
    """The same rows, further split wherever `position_ids [1 or B, Q]` do not go up by one.

    Rows that come with an `attention_mask` stay as they are, as in Transformers. Reads values, once
    per call, where they can be read: rows without restarts need no start for each query.
    """
    rows = decode(mask)
    if rows.padded:
        return mask
    query_len = position_ids.shape[1]
    jumps = position_ids.diff(dim=1) != 1
    if decidable(jumps) and not bool(jumps.any()):
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
    """True if `add_restarts` found more documents than the one that padding leaves in each row.
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
    planes, numbers, columns = (1, 1, 1) if mask.dim() != 4 else mask.shape[1:]
    if mask.dtype != torch.int32 or mask.dim() != 4 or planes > 3 or columns > 3:
        raise ValueError(
            "`attention_mask` must be None or a 2-D padding mask for spattention, whose bands take "
            f"the place of a 4-D mask, got shape {list(mask.shape)} of {mask.dtype}"
        )
    key_start = mask[:, 0, :, 0]
    by_row = numbers == 1 or planes > 1
    return Rows(
        key_start=key_start[:, 0] if by_row else key_start,
        query_start=mask[0, 0, 0, 1] if columns > 1 else None,
        padded=columns == 3 or (by_row and columns == 1),
        valid=mask[:, 1, :, 0] != 0 if planes > 1 else None,
        source=mask[:, 2, :, 0] if planes > 2 else None,
        before=mask[:, 0, 0, 2] if columns == 3 else None,
    )


def dense_mask(
    rows: Rows, query_len: int, key_len: int, window: int | None, device: torch.device
) -> torch.Tensor:
    """The causal mask of a layer that keeps its own attention, bool `[B or 1, 1, Q, K]`. As in
    Transformers, its window in tokens, itself included, counts padding between tokens too."""
    start = key_len - query_len if rows.query_start is None else rows.query_start
    positions = (start + torch.arange(query_len, device=device))[:, None]
    keys = torch.arange(key_len, device=device)
    mask = (keys <= positions)[None]
    if window is not None:
        mask = mask & (keys > positions - window)
    if rows.valid is not None:
        mask = mask & _columns(rows.valid, 0, key_len)[:, None]
    elif rows.key_start is not None:
        first = rows.key_start if rows.key_start.dim() == 2 else rows.key_start[:, None]
        mask = mask & (keys >= first[:, :, None])
    return mask[:, None]


def _encode(rows: Rows, batch_size: int, device: torch.device | str) -> torch.Tensor | None:
    key_start = rows.key_start
    if key_start is not None and not rows.padded and readable(key_start) and not key_start.any():
        key_start = None  # one document per row
    if key_start is None:
        if rows.query_start is None and not rows.padded:
            return None
        key_start = torch.zeros(batch_size, dtype=torch.int32, device=device)
    column = key_start.to(torch.int32).reshape(batch_size, 1, -1, 1)
    columns = [column]
    if rows.query_start is not None:
        columns.append(rows.query_start.to(torch.int32).expand_as(column))
        if rows.padded:
            before = torch.zeros_like(key_start) if rows.before is None else rows.before
            columns.append(before.to(torch.int32).reshape(column.shape))
    plane = torch.cat(columns, dim=-1)
    if rows.valid is None:
        return plane
    flags = [t for t in (rows.valid, rows.source) if t is not None]
    planes = [plane, *(t.to(torch.int32)[:, None, :, None] for t in flags)]
    shape = (batch_size, 1, rows.valid.shape[1], plane.shape[-1])
    return torch.cat([t.expand(shape) for t in planes], dim=1)


def check_padding(
    mask: torch.Tensor, batch_size: int, q_offset: int | torch.Tensor, q_length: int
) -> None:
    """Check the shape of a mask of padding; arguments as in `rows_mask`."""
    if mask.dim() != 2:
        raise ValueError(
            "`attention_mask` must be a 2-D padding mask for spattention, got shape "
            f"{list(mask.shape)}"
        )
    if mask.shape[0] != batch_size:
        raise ValueError(
            f"`attention_mask` must have a row for each of the {batch_size} of the batch, got "
            f"{mask.shape[0]}"
        )
    if isinstance(q_offset, int) or readable(q_offset):
        tokens = int(q_offset) + q_length
        if mask.shape[1] < tokens:
            raise ValueError(
                f"`attention_mask` must cover all {tokens} tokens so far, those in the cache "
                f"included, got {mask.shape[1]} columns"
            )


def _all_have_bands(config: Any) -> bool:
    """True if no layer keeps its own attention, which needs the padding among earlier keys."""
    section = None if config is None else read_section(config)
    return section is not None and None not in section.layer_patterns


def decidable(tensor: torch.Tensor) -> bool:
    """True if values can be read. That waits for a GPU; Transformers reads the same masks in the
    same places for its own attention."""
    return tensor.device.type != "meta" and not in_graph(tensor) and not is_batched(tensor)


def _padding(valid: torch.Tensor, query_start: int | torch.Tensor, query_len: int) -> Rows:
    """Rows under a mask of the keys of this call, bool `[B, K]`."""
    end = query_start + query_len
    column = torch.arange(valid.shape[1], device=valid.device)
    valid = valid & (column < end)  # what comes after the last query is seen by none
    tokens = valid.sum(dim=1)
    first = torch.where(tokens > 0, valid.to(torch.int32).argmax(dim=1), valid.shape[1])
    past = torch.where(valid, column + 1, 0).amax(dim=1)  # the last token of each row, and one
    new = _columns(valid, query_start, query_len)
    between, some = True, True
    if decidable(valid):
        flags = torch.stack([(past - first > tokens).any(), ~new.all()])
        between, some = flags.tolist()
    before = None if valid.is_cuda else tokens - new.sum(dim=1)  # for a check on the CPU
    if not between:
        return Rows(first, padded=True, valid=valid if some else None, before=before)
    # Padding first, then tokens; what a static cache has not filled yet stays at the end.
    source = padding_first(valid.to(torch.int32) + 2 * (column >= end))
    return Rows(end - tokens, padded=True, valid=valid, source=source, before=before)


def _new_padding(valid: torch.Tensor, q_offset: int | torch.Tensor, query_len: int) -> Rows:
    """Rows of a model whose cache keeps tokens alone: only new columns may hold padding."""
    new = _columns(valid, q_offset, query_len)
    before = None
    if not valid.is_cuda:  # for a check on the CPU
        earlier = torch.arange(valid.shape[1], device=valid.device) < q_offset
        before = (valid & earlier).sum(dim=1)
    if decidable(new) and bool(new.all()):
        return Rows(padded=True, before=before)
    return Rows(padded=True, valid=new, before=before)


def _columns(valid: torch.Tensor, start: int | torch.Tensor, count: int) -> torch.Tensor:
    """Columns `start .. start + count` of a bool `[B, n]`; False beyond its end."""
    if isinstance(start, int):
        some = valid[:, start : start + count]
        return torch.nn.functional.pad(some, (0, count - some.shape[1]))
    column = start + torch.arange(count, device=valid.device)
    last = max(0, valid.shape[1] - 1)
    return valid[:, column.clamp(0, last)] & (column < valid.shape[1])


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
