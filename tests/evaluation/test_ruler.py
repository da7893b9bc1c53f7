"""Prompts of long-context tasks hold what they ask for, and are scored by what an answer says."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from spattention.evaluation.ruler import NEEDLES, TASKS, ask, make_items, score

LENGTH = 300


class Characters:
    """A tokenizer whose tokens are characters."""

    def get_vocab(self):
        return {chr(k): k for k in range(128)}

    def convert_tokens_to_ids(self, token):
        return ord(token)

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(k) for k in ids.tolist())


class Answers:
    """A model that continues prompt k with `texts[k]`."""

    device = torch.device("cpu")
    generation_config = SimpleNamespace(eos_token_id=None)

    def __init__(self, texts):
        self.texts = list(texts)

    def eval(self):
        return self

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample, pad_token_id):
        assert bool(attention_mask.all())
        assert not do_sample
        texts = [self.texts.pop(0)[:max_new_tokens].ljust(max_new_tokens) for _ in input_ids]
        new = torch.tensor([[ord(c) for c in text] for text in texts])
        return torch.cat([input_ids, new], dim=1)


TOKENIZER = Characters()


def haystacks(items, length=1200):
    text = "It was a day in May. The sun came up! Who had seen it? "
    ids = [ord(c) for c in text * (length // len(text) + 2)]
    return [torch.tensor(ids[k : k + length]) for k in range(items)]


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_holds_its_answers_at_its_length(task):
    for item in make_items(task, haystacks(4), 1000, TOKENIZER):
        text = TOKENIZER.decode(item.tokens)
        assert len(item.tokens) == 1000
        assert all(answer in text for answer in item.answers)
        assert len(set(item.answers)) == len(item.answers)


@pytest.mark.parametrize("task", ["single", "multikey", "multivalue"])
def test_needles_stand_between_sentences(task):
    found = re.compile(r"One of the special magic numbers for ([a-z-]+) is: (\d{7})\.")
    for item in make_items(task, haystacks(6), 1200, TOKENIZER):
        text = TOKENIZER.decode(item.tokens)
        pairs = [match.groups() for match in found.finditer(text)]
        assert len(pairs) == (1 if task == "single" else NEEDLES)
        assert len({key for key, _ in pairs}) == (NEEDLES if task == "multikey" else 1)
        asked = re.search(r"for ([a-z-]+) mentioned in the provided text (is|are)$", text)
        wanted = {value for key, value in pairs if key == asked[1]}
        assert wanted == set(item.answers)
        assert all(text[match.start() - 2] in ".!?\n" for match in found.finditer(text))


def test_a_chain_runs_from_its_value_to_the_end():
    for item in make_items("tracking", haystacks(6), 1200, TOKENIZER):
        text = TOKENIZER.decode(item.tokens)
        links = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", text)
        assert [name for name, _ in links] == list(item.answers)
        assert [source for _, source in links[1:]] == list(item.answers[:-1])
        assert f"assigned the value {links[0][1]} in the text" in text


def test_items_are_a_function_of_their_arguments():
    def texts(**more):
        made = make_items("single", haystacks(3), 800, TOKENIZER, **more)
        return [TOKENIZER.decode(item.tokens) for item in made]

    assert texts() == texts() == texts(seed=0)
    assert not set(texts()) & set(texts(seed=1))


def test_scores_are_the_share_of_answers_found():
    assert score("The numbers are 12 and 34.", ("12", "34", "56", "78")) == 0.5
    assert score("var abcde", ("ABCDE",)) == 1.0
    items = make_items("multivalue", haystacks(3), 1200, TOKENIZER)
    texts = [" ".join(items[0].answers), items[1].answers[0], "nothing"]
    found = ask(Answers(texts), items, TOKENIZER, batch=2)
    assert found.mean == pytest.approx((1 + 0.25 + 0) / 3)
    assert found.items == 3


def test_wrong_tasks_and_lengths_are_named():
    with pytest.raises(ValueError, match=r"`task` must be one of .*got 'double'"):
        make_items("double", haystacks(1), 1000, TOKENIZER)
    with pytest.raises(ValueError, match=r"haystack 1 .* at least `length` = 1200 tokens, got 900"):
        make_items("single", [*haystacks(1), *haystacks(1, 900)], 1200, TOKENIZER)
    with pytest.raises(ValueError, match=r"`length` must be at least \d+ for .* single, got 300"):
        make_items("single", haystacks(1), LENGTH, TOKENIZER)
    with pytest.raises(ValueError, match=r"`items` must be of one length and task.*got 0"):
        ask(Answers([]), [], TOKENIZER)
