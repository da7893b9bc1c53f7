"""Needles: a passkey somewhere in a text and the question for it at the end."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STATEMENT = ("\nThe pass key is ", ". Remember it.\n")
QUESTION = "\nWhat is the pass key? The pass key is "
DIGITS = 5
LEAST_TEXT = 16  # tokens of a row that stay beside the needle and the question


@dataclass(frozen=True)
class Needle:
    """A row of tokens with a needle and, after it, the answer that repeats it.

    Attributes:
        tokens: int64 `[N]`.
        needle: positions of the tokens that heads fetch.
        answer: positions of the tokens to predict, after the needle.
        sentence: positions of the text around the needle that leads to it; None for the needle's.
    """

    tokens: Tensor
    needle: range
    answer: range
    sentence: range | None = None

    @property
    def queries(self) -> range:
        """The queries that predict the answer: each stands one token before its token."""
        return range(self.answer.start - 1, self.answer.stop - 1)

    @property
    def answer_tokens(self) -> Tensor:
        """The tokens of the answer, int64."""
        return self.tokens[self.answer.start : self.answer.stop]


def as_needle(given: Any, number: int) -> Needle:
    """A triple (tokens, needle range, answer range), checked; a needle as it is."""
    if isinstance(given, Needle):
        return given
    where = f"needle {number} of `needles`"
    try:
        tokens, needle, answer = given
        ids = torch.as_tensor(tokens)
        ranges = [range(int(start), int(stop)) for start, stop in (needle, answer)]
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{where} must be (tokens, (start, stop) of the needle, (start, stop) of the answer), "
            f"got {type(given).__name__}"
        ) from None
    if ids.dim() != 1 or ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise ValueError(f"{where} must have integer tokens [N], got {ids.dtype} {list(ids.shape)}")
    first, second = ranges
    if not 0 <= first.start < first.stop < second.start + 1 <= second.stop <= len(ids):
        raise ValueError(
            f"{where} must have 0 <= needle < answer within its {len(ids)} tokens, got "
            f"({first.start}, {first.stop}) and ({second.start}, {second.stop})"
        )
    return Needle(ids.long().cpu(), first, second)


def plant(rows: Sequence[Tensor], count: int, tokenizer: Any, seed: int = 0) -> list[Needle]:
    """Plant passkeys in rows of text `[N]`, used in turn, at depths spread evenly from start to
    end. A needle takes the place of some tokens. Raises `ValueError` if a row is too short."""
    draw = random.Random(seed)
    needles = []
    for number in range(count):
        row = rows[number % len(rows)]
        key = str(draw.randrange(10 ** (DIGITS - 1), 10**DIGITS))
        before, after, question = (_ids(tokenizer, text) for text in (*STATEMENT, QUESTION))
        value = _ids(tokenizer, key)
        room = len(row) - sum(map(len, (before, value, after, question, value)))
        if room < LEAST_TEXT:
            raise ValueError(
                f"`batches` must hold rows of at least {len(row) - room + LEAST_TEXT} tokens to "
                f"plant needles in, got {len(row)}"
            )
        depth = int((number + 0.5) / count * room)
        start = depth + len(before)
        tokens = torch.cat([row[:depth], before, value, after, row[depth:room], question, value])
        needles.append(
            Needle(
                tokens,
                range(start, start + len(value)),
                range(len(tokens) - len(value), len(tokens)),
                range(depth, start + len(value) + len(after)),
            )
        )
    return needles


def _ids(tokenizer: Any, text: str) -> Tensor:
    found = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not len(found):
        raise ValueError(f"`tokenizer` must give tokens for {text!r}, got none")
    return torch.tensor(found, dtype=torch.int64)
