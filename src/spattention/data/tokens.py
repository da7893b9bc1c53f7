"""Streams: documents of tokens laid end to end, and windows cut from them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

IGNORED = -100  # a label that no loss is taken of, PyTorch's convention
CHUNK = 2**20  # tokens that are read at a time


@dataclass(frozen=True)
class TokenStream:
    """Documents of tokens, end to end: `tokens [T]`, uint16 or uint32, of which document k is
    `tokens[starts[k]:starts[k + 1]]`. `starts [documents + 1]`, int64, runs from 0 to T."""

    tokens: np.ndarray
    starts: np.ndarray

    def __post_init__(self) -> None:
        starts = self.starts
        if self.tokens.ndim != 1 or self.tokens.dtype not in (np.uint16, np.uint32):
            raise ValueError(
                f"`tokens` must be one row of uint16 or uint32, "
                f"got {self.tokens.dtype} {list(self.tokens.shape)}"
            )
        if starts.ndim != 1 or starts.dtype != np.int64:
            raise ValueError(
                f"`starts` must be one row of int64, got {starts.dtype} {list(starts.shape)}"
            )
        if len(starts) < 2 or starts[0] != 0 or starts[-1] != len(self.tokens):
            raise ValueError(f"`starts` must run from 0 to the {len(self.tokens)} tokens")
        if (np.diff(starts) <= 0).any():
            raise ValueError("`starts` must increase: a document without tokens is not kept")

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.starts) - 1

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def from_documents(cls, documents: Sequence[np.ndarray]) -> TokenStream:
        """The stream of these documents, in this order; documents without tokens are dropped."""
        kept = [np.asarray(document) for document in documents if len(document)]
        if not kept:
            raise ValueError("`documents` must hold at least one token, got none")
        starts = np.cumsum([0, *(len(document) for document in kept)], dtype=np.int64)
        return cls(np.concatenate(kept), starts)

    def take(self, documents: Sequence[int]) -> TokenStream:
        """The stream of some of the documents, in the order given."""
        return TokenStream.from_documents(
            [self.tokens[self.starts[k] : self.starts[k + 1]] for k in documents]
        )

    def hold_out(self, fraction: float) -> tuple[TokenStream, TokenStream]:
        """Split into training and validation: whole documents, spread evenly over the stream.

        About `fraction` of the documents, and at least one, are held out. The choice depends on the
        stream alone, never on a seed. A stream of one document is cut near its end instead.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"`fraction` must lie between 0 and 1, got {fraction}")
        count = self.num_documents
        if count == 1:
            cut = math.ceil(len(self) * (1 - fraction))
            if not 0 < cut < len(self):
                raise ValueError(f"one document of {len(self)} tokens is too short to be split")
            return TokenStream.from_documents([self.tokens[:cut]]), TokenStream.from_documents(
                [self.tokens[cut:]]
            )
        held = min(count - 1, max(1, round(count * fraction)))
        chosen = {int((k + 0.5) * count / held) for k in range(held)}
        rest = [k for k in range(count) if k not in chosen]
        return self.take(rest), self.take(sorted(chosen))

    def unigram_entropy(self) -> float:
        """Entropy of the token frequencies, in nats: the least loss without looking at context."""
        counts = np.bincount(self.tokens)
        shares = counts[counts > 0] / len(self.tokens)
        return float(-(shares * np.log(shares)).sum())

    def digest(self) -> str:
        """SHA-256 of tokens and document starts, in hexadecimal: equal streams, equal digests."""
        return self.scan()[0]

    def scan(self) -> tuple[str, int]:
        """The digest and the largest token, in one pass that takes 1 s per GB of tokens."""
        found, largest = hashlib.sha256(), 0
        for begin in range(0, len(self), CHUNK):  # the stream may be larger than memory
            chunk = self.tokens[begin : begin + CHUNK]
            found.update(chunk.astype("<u4").tobytes())
            largest = max(largest, int(chunk.max()))
        found.update(self.starts.astype("<i8").tobytes())
        return found.hexdigest(), largest


class Windows(Dataset[dict[str, torch.Tensor]]):
    """A stream cut into windows of `context` tokens: a map-style dataset for the Trainer.

    Windows run across documents, as in the paper's packing. Tokens after the last whole window are
    not used. An item has `input_ids` and `labels`, int64 `[context]`; and `position_ids` alike if
    attention must not cross documents.

    Args:
        stream: the tokens.
        context: tokens per window, at least 2.
        limit: keep only this many windows, spread evenly over the stream; None keeps all.
        across_documents: whether tokens may attend earlier documents in their window. If not,
            positions count from each document's first token, by which models keep documents apart,
            and that token, which nothing of its document precedes, is no label (-100).
    """

    def __init__(
        self,
        stream: TokenStream,
        context: int,
        limit: int | None = None,
        *,
        across_documents: bool = True,
    ) -> None:
        if context < 2:
            raise ValueError(f"`context` must be at least 2 tokens, got {context}")
        count = len(stream) // context
        if count == 0:
            raise ValueError(
                f"`context` must be at most the {len(stream)} tokens of the text, got {context}"
            )
        if limit is not None and limit < 1:
            raise ValueError(f"`limit` must be at least 1 window, got {limit}")
        self.stream = stream
        self.context = context
        self.across_documents = across_documents
        kept = count if limit is None else min(limit, count)
        self.windows = range(count) if kept == count else [k * count // kept for k in range(kept)]

    def __len__(self) -> int:
        return len(self.windows)

    def used(self) -> TokenStream:
        """The tokens of all windows, each a document."""
        starts = (k * self.context for k in self.windows)
        rows = [self.stream.tokens[start : start + self.context] for start in starts]
        return TokenStream.from_documents(rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = self.windows[index] * self.context
        stop = start + self.context
        window = torch.from_numpy(self.stream.tokens[start:stop].astype(np.int64))
        if self.across_documents:
            return {"input_ids": window, "labels": window}
        inside = np.arange(start, stop)
        document = np.searchsorted(self.stream.starts, inside, side="right") - 1
        first = np.maximum(self.stream.starts[document], start)
        positions = torch.from_numpy(inside - first)
        labels = window.masked_fill(positions == 0, IGNORED)
        return {"input_ids": window, "labels": labels, "position_ids": positions}


class InOrder(Dataset[Any]):
    """The items of a dataset in a fixed random order, epoch after epoch, as one long dataset.

    Item k is item `order[k % n]` of the dataset's n, where each epoch `k // n` has an order of its
    own. The order depends on the seed and n alone: not on ranks, workers, or where a run began, so
    that whoever reads items k, k + 1, ... from the front of what is missing continues exactly.

    Args:
        dataset: map-style dataset to read.
        length: number of items over all epochs.
        seed: RNG seed of the orders.
    """

    def __init__(self, dataset: Dataset[Any], length: int, seed: int) -> None:
        self.dataset = dataset
        self.length = length
        self.seed = seed
        self._epoch = -1
        self._order = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(index)
        count = len(self.dataset)  # type: ignore[arg-type]
        epoch, place = divmod(index, count)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(count)
            self._epoch = epoch
        return self.dataset[int(self._order[place])]
