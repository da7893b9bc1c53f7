"""Validation loss, overall and by position in the context."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.tokens import IGNORED

ROWS = 4096  # tokens whose float32 logits exist at a time


@dataclass(frozen=True)
class Mean:
    """A mean over independent items and its standard error; the error of one item is infinite."""

    mean: float
    error: float
    items: int

    @classmethod
    def of(cls, values: Tensor) -> Mean:
        """The mean of `values [items]`."""
        count = len(values)
        error = math.inf if count < 2 else float(values.double().std()) / math.sqrt(count)
        return cls(float(values.double().mean()), error, count)

    def is_above(self, chance: float) -> bool:
        """True if the mean is positive, and above guessing by at least two standard errors."""
        return self.mean > 0 and self.mean - chance >= 2 * self.error

    def is_below(self, chance: float) -> bool:
        """True if the mean is below guessing by more than two standard errors.

        The error is at least that of guessing: a few items without a hit have an error of 0.
        """
        of_guessing = math.sqrt(chance * (1 - chance) / self.items)
        return chance - self.mean > 2 * max(self.error, of_guessing)


@dataclass(frozen=True)
class LossByPosition:
    """Nats per predicted token.

    Attributes:
        loss: mean over all tokens. The standard error is over windows, as tokens of a window are
            not independent.
        edges: positions of predicted tokens, `[parts + 1]`: part k is `edges[k] <= p < edges[k+1]`.
            A window's first token is not predicted, so the first edge is 1.
        parts: the loss of each part.
        context: tokens per window.
    """

    loss: Mean
    edges: tuple[int, ...]
    parts: tuple[Mean, ...]
    context: int


def position_edges(context: int, parts: int = 32) -> tuple[int, ...]:
    """Edges that double up to an even share of the context, and continue evenly.

    position_edges(1024, 4) == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024)
    """
    even = max(1, context // parts)
    edges = [2**k for k in range(even.bit_length()) if 2**k < even]
    edges += range(even, context, even)
    return (*sorted({1, *edges} - {0}), context)


def validation_loss(
    model: Any,
    windows: Any,
    *,
    batch: int = 1,
    edges: Sequence[int] | None = None,
    on_window: Callable[[int], None] = lambda done: None,
) -> LossByPosition:
    """The loss of a causal language model over windows of one length.

    Args:
        model: a model of Transformers. It is put into evaluation mode, without gradients.
        windows: `data.tokens.Windows`, or another sequence of `{"input_ids": int64 [N]}`. With
            `position_ids`, documents do not attend each other. Tokens whose `labels` are -100 do
            not count.
        batch: windows at a time.
        edges: positions as in `LossByPosition`; default `position_edges(N)`.
        on_window: called with the number of windows done.

    Raises:
        ValueError: if there are no windows, or the edges do not run from 1 to N.
    """
    if len(windows) == 0:
        raise ValueError("`windows` must hold at least one window, got none")
    context = len(windows[0]["input_ids"])
    edges = position_edges(context) if edges is None else tuple(edges)
    if edges[0] != 1 or edges[-1] != context or sorted(set(edges)) != list(edges):
        raise ValueError(f"`edges` must increase from 1 to {context}, got {list(edges)}")
    losses, counted = [], []
    for start in range(0, len(windows), batch):
        chosen = range(start, min(start + batch, len(windows)))
        items = [windows[k] for k in chosen]
        ids = torch.stack([item["input_ids"] for item in items])
        apart = "position_ids" in items[0]
        positions = torch.stack([item["position_ids"] for item in items]) if apart else None
        losses.append(token_losses(model, ids, positions).cpu())
        labels = torch.stack([item.get("labels", item["input_ids"]) for item in items])
        counted.append(labels[:, 1:] != IGNORED)
        on_window(chosen.stop)
    counts = torch.cat(counted)  # [windows, N - 1]; column p is position p + 1
    all_losses = torch.cat(losses).double().where(counts, 0.0)

    def over(near: int, far: int) -> Mean:
        """The mean over all tokens at these positions, with the error of the windows' means."""
        total = all_losses[:, near - 1 : far - 1].sum(dim=1)
        tokens = counts[:, near - 1 : far - 1].sum(dim=1)
        by_window = Mean.of((total / tokens)[tokens > 0])
        return Mean(float(total.sum() / tokens.sum()), by_window.error, by_window.items)

    parts = tuple(over(near, far) for near, far in zip(edges, edges[1:]))
    return LossByPosition(over(1, context), tuple(edges), parts, context)


@torch.no_grad()
def token_losses(model: Any, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of every token but the first, in nats, float32 `[B, N - 1]` on the
    model's device. Positions `[B, N]` count from 0 in each document; None stands for one document
    per row."""
    model.eval()
    ids = ids.to(model.device)
    more = {} if positions is None else {"position_ids": positions.to(model.device)}
    logits = model(input_ids=ids, use_cache=False, **more).logits[:, :-1]
    targets = ids[:, 1:].flatten()
    found = [
        F.cross_entropy(rows.float(), wanted, reduction="none")
        for rows, wanted in zip(logits.flatten(0, 1).split(ROWS), targets.split(ROWS))
    ]
    return torch.cat(found).view(ids.shape[0], -1)
