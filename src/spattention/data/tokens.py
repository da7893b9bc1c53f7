"""Packed streams: documents of tokens laid end to end, and windows cut from them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset


@dataclass(frozen=True)
class TokenStream:
    """Documents of tokens, end to end.

    Args:
        tokens: `[T]`, uint16 or uint32.
        starts: `[documents + 1]`, int64: document k is `tokens[starts[k]:starts[k + 1]]`; from 0 to
            T.
    """

    tokens: np.ndarray
    starts: np.ndarray

    def __post_init__(self) -> None:
        starts = self.starts
        if self.tokens.ndim != 1 or self.tokens.dtype not in (np.uint16, np.uint32):
            raise ValueError(
                f"`tokens` must be one row of uint16 or uint32, "
                f"got {self.tokens.dtype} {list(self.tokens.shape)}"
            )
        if len(starts) < 2 or starts[0] != 0 or starts[-1] != len(self.tokens):
            raise ValueError(f"`starts` must run from 0 to the {len(self.tokens)} tokens")
        if (np.diff(starts) <= 0).any():
            raise ValueError("`starts` must increase: a document without tokens is not kept")

    @property
    def num_documents(self) -> int:
        """How many documents the stream holds."""
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
        found = hashlib.sha256()
        found.update(self.tokens.astype("<u4").tobytes())
        found.update(self.starts.astype("<i8").tobytes())
        return found.hexdigest()


class Windows(Dataset[dict[str, torch.Tensor]]):
    """A stream cut into windows of `context` tokens: a map-style dataset for the Trainer.

    Windows run across documents, as in the paper's packing. Tokens after the last whole window are
    not used.

    Args:
        stream: the tokens.
        context: tokens per window, at least 2.
        limit: keep only this many windows, spread evenly over the stream; None keeps all.
    """

    def __init__(self, stream: TokenStream, context: int, limit: int | None = None) -> None:
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
        kept = count if limit is None else min(limit, count)
        self.windows = [k * count // kept for k in range(kept)]

    def __len__(self) -> int:
        return len(self.windows)

    def used(self) -> TokenStream:
        """The tokens of all windows, each a document."""
        starts = (k * self.context for k in self.windows)
        rows = [self.stream.tokens[start : start + self.context] for start in starts]
        return TokenStream.from_documents(rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = self.windows[index] * self.context
        tokens = self.stream.tokens[start : start + self.context].astype(np.int64)
        window = torch.from_numpy(tokens)
        return {"input_ids": window, "labels": window}
