"""The prefixes of a `BandStore`: the first tokens of each sequence's document, outside the rings.

`documents` int64 `[B, max_rollback + 2]` says where documents start:

    column p % (max_rollback + 1)   `key_start` of the token at position p, for the newest tokens
    last column                     `key_start` of the held document

The held document is the one that the next query can belong to at the earliest, after a `crop` of
`max_rollback`. A document that starts later is so new that the rings hold its first tokens still.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .cache_layout import HeadGroup, RingLayout
from .checks import readable
from .padding import padding_first, reorder


class StoredTokens(NamedTuple):
    """The tensors of a `BandStore`, by the names that they have there."""

    keys: Tensor  # [B, slots + 1, D]
    values: Tensor  # [B, slots + 1, Dv]
    counts: Tensor  # [4, B]
    documents: Tensor
    layout: RingLayout


def new_documents(batch_size: int, max_rollback: int, device: torch.device) -> Tensor:
    """`documents` of an empty store."""
    return torch.zeros(batch_size, max_rollback + 2, dtype=torch.int64, device=device)


def prefix_slots(stored: StoredTokens, first: Tensor, rings: HeadGroup) -> Tensor:
    """Slots of the first tokens of documents in C rings, int64 `[B, ..., C, prefix]`, valid for
    tokens that are in the store. The documents start at positions `first [B, ...]`."""
    place = torch.arange(stored.layout.pattern.prefix, device=first.device)
    at = first[..., None, None] + place
    in_ring = rings.offset[:, None] + at % rings.length.clamp(min=1)[:, None]
    held = stored.documents[:, -1].view(-1, *(1,) * (first.dim() - 1))
    return torch.where((first == held)[..., None, None], rings.prefix[:, None] + place, in_ring)


def last_document(stored: StoredTokens) -> Tensor:
    """`key_start` of each sequence's last token, int64 `[B, 1]`; 0 for an empty sequence."""
    position, columns = stored.counts[0][:, None], stored.documents.shape[1] - 1
    start = stored.documents.gather(1, (position - 1) % columns)
    return start.masked_fill(position == 0, 0)


def hold(
    stored: StoredTokens, key: Tensor, value: Tensor, mask: Tensor | None, key_start: Tensor | None
) -> None:
    """Take up the next tokens, before the rings do: the held document's among its first, and where
    their documents start. Arguments are those of `BandStore.append`.
    """
    documents, new = stored.documents, key.shape[2]
    position, highest = stored.counts[0], stored.counts[2]
    first = last_document(stored).expand(-1, new)
    if key_start is not None:
        first = first_of_each(key_start, new)
    count = torch.full_like(position, new)
    if mask is not None:
        order, count = padding_first(mask), mask.sum(dim=1)
        key, value, first = reorder(key, order), reorder(value, order), first.gather(1, order)
    columns, padding = documents.shape[1] - 1, new - count
    oldest = (torch.maximum(highest, position + count) - columns).clamp(min=0)
    column = (oldest - position + padding).clamp(0, new - 1)
    held = torch.where(
        oldest >= position,
        first.gather(1, column[:, None])[:, 0],
        documents.gather(1, (oldest % columns)[:, None])[:, 0],
    )
    _hold_tokens(stored, key, value, held, count)
    documents[:, -1] = held
    column = torch.arange(new - min(new, columns), new, device=first.device)
    at = position[:, None] + column - padding[:, None]
    index = at % columns
    known = documents.gather(1, index)
    documents.scatter_(1, index, torch.where(at >= position[:, None], first[:, column], known))


def first_of_each(key_start: Tensor, tokens: int) -> Tensor:
    """`key_start` `[B]` or `[B, n]` for each of n tokens, int64 `[B, n]`."""
    first = key_start.to(torch.int64).clamp(min=0)
    return first if first.dim() == 2 else first[:, None].expand(-1, tokens)


def hold_first(
    stored: StoredTokens, key: Tensor, value: Tensor, mask: Tensor | None, *, is_empty: bool
) -> None:
    """The same of a store whose documents all start at 0, and which may be known to be empty."""
    if mask is None and is_empty and key.shape[2] >= stored.layout.pattern.prefix:
        hold_start(stored, key, value)
    elif mask is None and key.shape[2] == 1:
        hold_next(stored, key, value)
    else:
        hold_some(stored, key, value, mask)


def fewest_tokens(key: Tensor, mask: Tensor | None) -> int:
    """Tokens that every sequence has among these at least, known without waiting for a device."""
    if mask is None:
        return key.shape[2]
    return int(mask.sum(dim=1).min()) if readable(mask) else 0


def hold_some(stored: StoredTokens, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    """Any number of tokens, with padding or not, at any position."""
    count = torch.full_like(stored.counts[0], key.shape[2])
    if mask is not None:
        order, count = padding_first(mask), mask.sum(dim=1)
        key, value = reorder(key, order), reorder(value, order)
    live, device = stored.layout.live, key.device
    slots = live.prefix[:, None] + torch.arange(stored.layout.pattern.prefix, device=device)
    _fill(stored, key, value, torch.zeros_like(count), count, slots[None])


def hold_start(stored: StoredTokens, key: Tensor, value: Tensor) -> None:
    """The first tokens of an empty store, at least as many as a prefix has."""
    live, prefix = stored.layout.live, stored.layout.pattern.prefix
    target = live.prefix[:, None] + torch.arange(prefix, device=key.device)
    for buffer, tokens in ((stored.keys, key), (stored.values, value)):
        chosen = tokens[:, :, :prefix].index_select(1, live.heads)
        buffer.index_copy_(1, target.flatten(), chosen.flatten(1, 2))


def hold_next(stored: StoredTokens, key: Tensor, value: Tensor) -> None:
    """One token `[B, Hkv, 1, D]` in each sequence, whatever its position. A token that
    is not of the prefix goes to its slot in the ring, where `append` writes it as well: no branch
    on a position, and no other token moves.
    """
    live, position = stored.layout.live, stored.counts[0][:, None]
    in_ring = live.offset + position % live.length
    early = position < stored.layout.pattern.prefix
    slots = torch.where(early, live.prefix + position, in_ring)  # [B, C]
    rows = torch.arange(len(slots), device=slots.device)[:, None]
    for buffer, tokens in ((stored.keys, key), (stored.values, value)):
        every = len(live.heads) == tokens.shape[1]
        chosen = tokens if every else tokens.index_select(1, live.heads)
        buffer[rows, slots] = chosen.squeeze(2)


def _hold_tokens(
    stored: StoredTokens, key: Tensor, value: Tensor, held: Tensor, count: Tensor
) -> None:
    """Fill the prefixes with the first tokens of the documents that start at `held [B]`."""
    position = stored.counts[0]
    if readable(held) and torch.equal(held, stored.documents[:, -1]):
        end = held + stored.layout.pattern.prefix
        if bool(((end <= position) | (held >= position + count)).all()):
            return
    _fill(stored, key, value, held, count, prefix_slots(stored, held, stored.layout.live))


def _fill(
    stored: StoredTokens, key: Tensor, value: Tensor, held: Tensor, count: Tensor, slots: Tensor
) -> None:
    """Fill the prefixes from new tokens, and from `slots [B or 1, C, prefix]` before these."""
    live, new = stored.layout.live, key.shape[2]
    position = stored.counts[0][:, None]
    place = torch.arange(stored.layout.pattern.prefix, device=held.device)
    at = held[:, None] + place
    is_new = (at >= position) & (at < position + count[:, None])  # [B, prefix]
    column = (at - position + (new - count)[:, None]).clamp(0, new - 1)
    rows = torch.arange(len(held), device=held.device)[:, None, None]
    target = (live.prefix[:, None] + place).flatten()
    for buffer, tokens in ((stored.keys, key), (stored.values, value)):
        chosen = tokens[rows, live.heads[:, None], column[:, None]]  # [B, C, prefix, D]
        kept = torch.where(is_new[:, None, :, None], chosen, buffer[rows, slots])
        buffer.index_copy_(1, target, kept.flatten(1, 2))


def move(before: StoredTokens, after: StoredTokens) -> None:
    """Fill the prefixes and `documents` of another layout, whose rings and counts are moved
    already."""
    position, columns = before.counts[0][:, None], before.documents.shape[1] - 1
    place = torch.arange(after.documents.shape[1] - 1, device=position.device)
    at = position - 1 - (position - 1 - place) % len(place)  # the newest position of each column
    known = before.documents.gather(1, at.clamp(min=0) % columns)
    kept = (at >= 0) & (at >= before.counts[2][:, None] - columns)
    after.documents[:, :-1] = known.masked_fill(~kept, 0)
    oldest = (after.counts[2] - len(place)).clamp(min=0)
    held = before.documents.gather(1, (oldest % columns)[:, None])[:, 0]
    after.documents[:, -1] = held
    slots = prefix_slots(before, held, before.layout.live)
    rows = torch.arange(len(held), device=held.device)[:, None, None]
    for old, new in ((before.keys, after.keys), (before.values, after.values)):
        target = after.layout.live.prefix[:, None] + torch.arange(slots.shape[2], device=old.device)
        new.index_copy_(1, target.flatten(), old[rows, slots].flatten(1, 2))


def check_documents(
    stored: StoredTokens, key_start: Tensor, tokens: int, mask: Tensor | None
) -> None:
    """Check that documents start at new tokens: the first tokens of any other are gone. `key_start`
    is that of the next tokens, and `mask [B, n]` is False for padding among them.

    Raises:
        ValueError: if a document starts before these tokens and was not the last one.
    """
    position, known = stored.counts[0], last_document(stored)
    for row, starts in enumerate(first_of_each(key_start, tokens)):
        new = starts if mask is None else starts[mask[row]]
        earlier = torch.cat([known[row], new])[:-1]
        fine = (new == earlier) | (new >= position[row])
        if len(new) and position[row] == 0:
            fine[0] = True
        if not bool(fine.all()):
            column = int((~fine).nonzero()[0])
            raise ValueError(
                "`key_start` must stay, or move to a new token, where the pattern has a prefix, "
                f"got {int(new[column])} after {int(earlier[column])} in row {row}, where "
                f"{int(position[row])} tokens are in the store"
            )


def check_held_documents(stored: StoredTokens, key_start: Tensor | None, tokens: int) -> None:
    """Check that the store's last tokens have this `key_start`; raises `ValueError`."""
    start = torch.zeros_like(stored.counts[0]) if key_start is None else key_start
    first = first_of_each(start, tokens)
    position, columns = stored.counts[0][:, None], stored.documents.shape[1] - 1
    column = torch.arange(-first.shape[1], 0, device=first.device)
    known = stored.documents.gather(1, (position + column) % columns)
    if not torch.equal(first, known):
        row = int((first != known).any(dim=1).nonzero()[0])
        raise ValueError(
            "`key_start` must be the one that the tokens were appended with, where the pattern has "
            f"a prefix, got {first[row].tolist()} for {known[row].tolist()} in row {row}"
        )
