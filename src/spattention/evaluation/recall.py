"""Recall from the context, which bands of distances may be bad at, without training for it.

    copying   X, then X again: is the second copy predicted from the first, at this distance?
    pairs     k1 v1 k2 v2 ..., then the keys in another order: which value follows each key?
              (multi-query associative recall, Arora et al., 2023, arXiv:2312.04927)
    needle    a key and its value somewhere in real text, the key again at the end

X, keys, values and needles are random tokens, which only the context can predict. A score within
two standard errors of guessing is near chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .perplexity import ROWS, Mean

NEEDLE = 8  # tokens of a needle's key, and of its value
DEPTHS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)


@dataclass(frozen=True)
class Question:
    """Sequences, and the tokens in them that the model is asked for.

    Args:
        task: "copying", "pairs" or "needle".
        setting: the distance in tokens, the number of pairs, or the depth of the needle: 0 at the
            start of the context, 1 at its end.
        ids: int64 `[items, N]`.
        asked: bool `[items, N]`: tokens to predict from those before, the same number per item.
        chance: accuracy of guessing.
    """

    task: str
    setting: float
    ids: Tensor
    asked: Tensor
    chance: float


@dataclass(frozen=True)
class Score:
    """A model's score on a question, over its sequences. The loss is in nats per asked token."""

    task: str
    setting: float
    accuracy: Mean
    loss: Mean
    chance: float

    @property
    def near_chance(self) -> bool:
        """True if the accuracy is not above guessing by two standard errors."""
        return not self.accuracy.is_above(self.chance)

    @property
    def below_chance(self) -> bool:
        """True if the accuracy is below guessing by more than two standard errors."""
        return self.accuracy.is_below(self.chance)


def copying(vocabulary: int, distance: int, items: int, seed: int = 0) -> Question:
    """A question of `distance` random tokens, twice.

    All tokens of the second copy but the first are asked. Guessing among all tokens is chance.
    """
    _check(vocabulary, items, distance=(distance, 2))
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(0, vocabulary, (items, distance), generator=generator)
    asked = torch.zeros(items, 2 * distance, dtype=torch.bool)
    asked[:, distance + 1 :] = True
    return Question("copying", distance, torch.cat([half, half], dim=1), asked, 1 / vocabulary)


def pairs(vocabulary: int, count: int, items: int, seed: int = 0) -> Question:
    """A question of `count` keys with a value each, then the keys again in another order.

    These are `4 count` tokens. Keys and values are all different. Chance is to guess one of the
    values that were shown.
    """
    _check(vocabulary, items, count=(count, 1))
    if 2 * count > vocabulary:
        raise ValueError(f"`count` must be at most half of {vocabulary} tokens, got {count}")
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(items):
        drawn = torch.randperm(vocabulary, generator=generator)[: 2 * count].view(count, 2)
        again = drawn[torch.randperm(count, generator=generator)]
        rows.append(torch.cat([drawn.flatten(), again.flatten()]))
    asked = torch.zeros(items, 4 * count, dtype=torch.bool)
    asked[:, 2 * count + 1 :: 2] = True
    return Question("pairs", count, torch.stack(rows), asked, 1 / count)


def needle(text: Tensor, vocabulary: int, depth: float, seed: int = 0) -> Question:
    """A question of text `[items, N]` with a needle in it, at a depth from 0 to 1, and its key
    again at the end; the value is asked. `4 NEEDLE` tokens of the text are replaced."""
    items, length = text.shape
    _check(vocabulary, items, length=(length, 4 * NEEDLE))
    if not 0 <= depth <= 1:
        raise ValueError(f"`depth` must be from 0 to 1, got {depth}")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, vocabulary, (items, 2 * NEEDLE), generator=generator)
    rest = text[:, : length - 4 * NEEDLE]
    place = round(depth * rest.shape[1])
    ids = torch.cat([rest[:, :place], drawn, rest[:, place:], drawn], dim=1)
    asked = torch.zeros_like(ids, dtype=torch.bool)
    asked[:, -NEEDLE:] = True
    return Question("needle", depth, ids, asked, 1 / vocabulary)


def questions(
    vocabulary: int, context: int, text: Tensor, items: int = 16, seed: int = 0
) -> Iterator[Question]:
    """All questions that fit into a context, smallest first; text `[items, context]` are the
    haystacks."""
    for distance in (2**k for k in range(3, 32)):
        if 2 * distance <= context:
            yield copying(vocabulary, distance, items, seed)
    for count in (4**k for k in range(1, 16)):
        if 4 * count <= context and 2 * count <= vocabulary:
            yield pairs(vocabulary, count, items, seed)
    if context > 4 * NEEDLE:
        for depth in DEPTHS:
            yield needle(text[:items], vocabulary, depth, seed)


@torch.no_grad()
def ask(model: Any, question: Question, *, batch: int = 1) -> Score:
    """Put a question to a causal language model of Transformers, `batch` sequences at a time."""
    model.eval()
    right, losses = [], []
    for ids, asked in zip(question.ids.split(batch), question.asked.split(batch)):
        ids = ids.to(model.device)
        before = asked[:, 1:].to(model.device)  # the position whose logits are for the token
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1][before]
        wanted = ids[:, 1:][before]
        found = [
            (rows.argmax(dim=-1) == answer, F.cross_entropy(rows.float(), answer, reduction="none"))
            for rows, answer in zip(logits.split(ROWS), wanted.split(ROWS))
        ]
        right.append(torch.cat([hit for hit, _ in found]).view(len(ids), -1).double().mean(1).cpu())
        losses.append(torch.cat([loss for _, loss in found]).view(len(ids), -1).mean(1).cpu())
    return Score(
        question.task,
        question.setting,
        Mean.of(torch.cat(right)),
        Mean.of(torch.cat(losses)),
        question.chance,
    )


def recall(
    model: Any,
    asked: Sequence[Question],
    *,
    tokens: int = 65_536,
    on_score: Callable[[Score], None] = lambda score: None,
) -> list[Score]:
    """Put all questions, at most `tokens` tokens at a time."""
    scores = []
    for question in asked:
        scores.append(ask(model, question, batch=max(1, tokens // question.ids.shape[1])))
        on_score(scores[-1])
    return scores


def _check(vocabulary: int, items: int, **sizes: tuple[int, int]) -> None:
    for name, (value, least) in [
        ("vocabulary", (vocabulary, 2)),
        ("items", (items, 1)),
        *sizes.items(),
    ]:
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}")
