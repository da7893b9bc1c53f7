"""Needles and chains of variables in long text: tasks after RULER (Hsieh et al., 2024,
arXiv:2404.06654), made here from any haystack of tokens.

    single       one needle, one question                           (RULER's niah_single_2)
    multikey     four needles with a key each, a question for one   (niah_multikey_1)
    multivalue   four needles with one key, a question for all      (niah_multivalue)
    tracking     a chain of five variables that hold one number     (vt, one chain, four hops)

Keys are an adjective and a noun, values are numbers of seven digits (tracking: five). The answer is
continued greedily from the start of a sentence, and scored by the share of expected texts that it
contains, whatever their case. A model that was not tuned for chats needs no template.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .perplexity import Mean

Task = Literal["single", "multikey", "multivalue", "tracking"]
TASKS: tuple[Task, ...] = ("single", "multikey", "multivalue", "tracking")
NEEDLES = 4  # of multikey and multivalue
HOPS = 4
NEW_TOKENS = {"single": 128, "multikey": 128, "multivalue": 128, "tracking": 30}  # as RULER
LEAST_TEXT = 16  # tokens of the haystack
ADJECTIVES = (
    "ancient", "brave", "calm", "distant", "eager", "faithful", "gentle", "hollow", "idle", "jolly",
    "keen", "lonely", "modest", "narrow", "orderly", "patient", "quiet", "rapid", "silent", "tidy",
    "useful", "vivid", "wise", "young",
)  # fmt: skip
NOUNS = (
    "anchor", "bridge", "candle", "desert", "engine", "forest", "garden", "harbor", "island",
    "jacket", "kettle", "ladder", "meadow", "needle", "orchard", "pillow", "quarry", "river",
    "saddle", "temple", "umbrella", "valley", "window", "yard",
)  # fmt: skip
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Item:
    """A prompt, int64 `[N]`, and the texts that its answer of `new_tokens` must contain."""

    task: Task
    tokens: Tensor
    answers: tuple[str, ...]
    new_tokens: int


@dataclass(frozen=True)
class _Words:
    """The texts of an item: those to hide, around them and after them."""

    hidden: tuple[str, ...]
    opening: str
    question: str
    answers: tuple[str, ...]


def make_items(
    task: Task, haystacks: Sequence[Tensor], length: int, tokenizer: Any, *, seed: int = 0
) -> list[Item]:
    """One item per haystack, each a prompt of exactly `length` tokens.

    Needles stand at random depths, after the end of a sentence where there is one. The same
    arguments give the same items.

    Args:
        task: one of `TASKS`.
        haystacks: int64 tokens of text, at least `length` each.
        length: tokens of a prompt; its answer comes on top.
        tokenizer: of Transformers, that of the haystacks.
        seed: RNG seed of keys, values and depths.

    Raises:
        ValueError: if the task is not known, a haystack is too short, or `length` has no room for
            text beside the needles.
    """
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {list(TASKS)}, got {task!r}")
    ends = _ends_of_sentences(tokenizer)
    items = []
    for number, haystack in enumerate(haystacks):
        if len(haystack) < length:
            raise ValueError(
                f"haystack {number} of `haystacks` must have at least `length` = {length} tokens, "
                f"got {len(haystack)}"
            )
        draw = random.Random(f"{task} {length} {seed} {number}")
        words = _tracking(draw) if task == "tracking" else _needles(task, draw)
        hidden = [_ids(tokenizer, text) for text in words.hidden]
        opening, question = _ids(tokenizer, words.opening), _ids(tokenizer, words.question)
        room = length - len(opening) - len(question) - sum(map(len, hidden))
        if room < LEAST_TEXT:
            raise ValueError(
                f"`length` must be at least {length - room + LEAST_TEXT} for the task {task}, got "
                f"{length}"
            )
        text = haystack[:room].long().cpu()
        places = _places(text, ends, len(hidden), draw)
        parts = [opening]
        for start, stop, needle in zip([0, *places], places, hidden):
            parts += [text[start:stop], needle]
        tokens = torch.cat([*parts, text[places[-1] :], question])
        items.append(Item(task, tokens, words.answers, NEW_TOKENS[task]))
    return items


def score(answer: str, expected: Sequence[str]) -> float:
    """The share of expected texts that an answer contains: RULER's `string_match_all`."""
    found = answer.lower()
    return sum(text.lower() in found for text in expected) / len(expected)


@torch.no_grad()
def ask(model: Any, items: Sequence[Item], tokenizer: Any, *, batch: int = 1) -> Mean:
    """Mean score of a causal language model, which is put into evaluation mode, over items of one
    length and task, `batch` at a time. Raises `ValueError` for no items or items that differ."""
    if len({(len(item.tokens), item.new_tokens) for item in items}) != 1:
        raise ValueError(f"`items` must be of one length and task, at least one, got {len(items)}")
    model.eval()
    scores = []
    for start in range(0, len(items), batch):
        chosen = items[start : start + batch]
        ids = torch.stack([item.tokens for item in chosen]).to(model.device)
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=chosen[0].new_tokens,
            do_sample=False,
            pad_token_id=model.generation_config.eos_token_id or 0,
        )
        for item, row in zip(chosen, found[:, ids.shape[1] :]):
            scores.append(score(tokenizer.decode(row, skip_special_tokens=True), item.answers))
    return Mean.of(torch.tensor(scores))


def _needles(task: Task, draw: random.Random) -> _Words:
    keys = _keys(draw, NEEDLES if task == "multikey" else 1)
    count = NEEDLES if task == "multivalue" else 1
    values = {key: [str(draw.randrange(10**6, 10**7)) for _ in range(count)] for key in keys}
    hidden = [
        f" One of the special magic numbers for {key} is: {value}."
        for key, numbers in values.items()
        for value in numbers
    ]
    draw.shuffle(hidden)
    asked = draw.choice(keys)
    many = task == "multivalue"
    opening = (
        f"{'Some special magic numbers are' if many else 'A special magic number is'} hidden "
        "within the following text. Make sure to memorize it. I will quiz you about the "
        f"{'numbers' if many else 'number'} afterwards.\n"
    )
    # The end of the prompt starts the answer, so that its form is not what is measured.
    question = (
        f"\nWhat {'are all the special magic numbers' if many else 'is the special magic number'} "
        f"for {asked} mentioned in the provided text? The special magic "
        f"{'numbers' if many else 'number'} for {asked} mentioned in the provided text "
        f"{'are' if many else 'is'}"
    )
    return _Words(tuple(hidden), opening, question, tuple(values[asked]))


def _tracking(draw: random.Random) -> _Words:
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(draw.choices(LETTERS, k=5))
        if name not in names:
            names.append(name)
    value = str(draw.randrange(10**4, 10**5))
    chain = [f" VAR {names[0]} = {value}."]
    chain += [f" VAR {after} = VAR {before}." for before, after in zip(names, names[1:])]
    opening = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    )
    question = (
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above. "
        "Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(names)} variables are assigned the value {value}, they are:"
    )
    return _Words(tuple(chain), opening, question, tuple(names))


def _keys(draw: random.Random, count: int) -> list[str]:
    keys: list[str] = []
    while len(keys) < count:
        key = f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}"
        if key not in keys:
            keys.append(key)
    return keys


def _places(text: Tensor, ends: Tensor, count: int, draw: random.Random) -> list[int]:
    """Places in the text, ascending, each after a sentence where the text has any."""
    after = (torch.isin(text, ends).nonzero().flatten() + 1).tolist() or list(range(1, len(text)))
    return sorted(draw.choice(after) for _ in range(count))


def _ends_of_sentences(tokenizer: Any) -> Tensor:
    """Tokens that end a sentence."""
    found = [
        tokenizer.convert_tokens_to_ids(token)
        for token in tokenizer.get_vocab()
        if re.fullmatch(r"[.!?]+", token)
    ]
    return torch.tensor(sorted(found), dtype=torch.int64)


def _ids(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
