"""Documents in a row of `benchmarks.training` that do not see one another."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from transformers import PreTrainedModel

from spattention.bands import BandPattern
from spattention.choice import AttentionChoice

from .packed import document_lengths


@dataclass(frozen=True)
class Documents:
    """Documents that fill a row, one after another.

    Attributes:
        lengths: of each, in tokens.
    """

    lengths: tuple[int, ...]

    @classmethod
    def of(cls, count: int, length: int) -> Documents:
        """As many documents in a row of `length` tokens, whose lengths are log-normal with sigma 1
        and seed 0; the longest takes what rounding leaves.
        """
        if not 1 <= count <= length:
            raise ValueError(f"documents of a row must be 1 to {length}, got {count}")
        lengths = document_lengths(length // count, count, length)
        lengths[lengths.index(max(lengths))] += length - sum(lengths)
        if min(lengths) < 1:
            raise ValueError(f"{count} documents must fit into {length} tokens, got {lengths}")
        return cls(tuple(lengths))

    def first(self, device: torch.device) -> torch.Tensor:
        """int32 `[N]`: the first token of each token's document."""
        lengths = torch.tensor(self.lengths)
        starts = lengths.cumsum(0) - lengths
        return starts.repeat_interleave(lengths).to(device, torch.int32)

    def until(self, length: int) -> Documents:
        """The documents of the first `length` tokens, the last of them cut."""
        ends = [min(end, length) for end in accumulate(self.lengths)]
        lengths = [end - start for start, end in pairwise([0, *ends])]
        return Documents(tuple(tokens for tokens in lengths if tokens))

    def offsets(self, device: torch.device) -> torch.Tensor:
        """int32 `[documents + 1]`: the first token of each document, and the end of the last."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=device)

    def positions(self, device: torch.device) -> torch.Tensor:
        """`[N]`: positions that restart with each document, as `position_ids`."""
        first = self.first(device).long()
        return torch.arange(len(first), device=device) - first

    def mask_of(self, pattern: BandPattern, length: int, device: torch.device) -> torch.Tensor:
        """bool `[H, length, length]`: a pattern in each document, over the row's first tokens."""
        found = torch.zeros(pattern.num_heads, length, length, dtype=torch.bool, device=device)
        start = 0
        for size in self.until(length).lengths:
            stop = start + size
            found[:, start:stop, start:stop] = pattern.mask(size, device=device)
            start = stop
        return found

    def mask(self, device: torch.device) -> torch.Tensor:
        """bool `[N, N]`: causal within each document."""
        first = self.first(device)
        same = first[:, None] == first
        return same.tril_()


@dataclass(frozen=True)
class Separated:
    """An `AttentionChoice` over the documents of a row."""

    attention: AttentionChoice
    documents: Documents

    @property
    def name(self) -> str:
        return self.attention.name

    def apply(self, model: PreTrainedModel) -> None:
        self.attention.apply(model)

    def pairs(self, seq_len: int) -> int:
        """Attended pairs of one layer over a row of the documents' tokens."""
        lengths = self.documents.lengths
        assert seq_len == sum(lengths)
        return sum(self.attention.pairs(length) for length in lengths)
