"""Zero-shot tasks from JSON lines, scored by log-likelihood: the harness's prompts, in few lines.

hellaswag, piqa and arc_easy divide a choice's log-likelihood by its bytes; sciq and winogrande do
not; lambada asks for the most likely word.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spattention.evaluation.perplexity import Mean

BUCKETS = (128, 512)  # tokens per row, so that few shapes occur
TOKENS = 32_768  # of a batch


@dataclass(frozen=True)
class Question:
    """Choices `(context, continuation)`, the index of the right one, and how they are scored."""

    choices: tuple[tuple[str, str], ...]
    answer: int
    by_bytes: bool = False


def _hellaswag(item: Any) -> Question:
    context = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}".strip()
    return Question(
        tuple((context, f" {end}") for end in item["endings"]), int(item["label"]), True
    )


def _piqa(item: Any) -> Question:
    context = f"Question: {item['goal']}\nAnswer:"
    choices = tuple((context, f" {item[name]}") for name in ("sol1", "sol2"))
    return Question(choices, int(item["label"]), True)


def _arc_easy(item: Any) -> Question:
    choices = tuple((item["query"], f" {choice}") for choice in item["choices"])
    return Question(choices, int(item["gold"]), True)


def _winogrande(item: Any) -> Question:
    start, end = item["sentence"].split("_")
    choices = tuple((start + item[name], f" {end.strip()}") for name in ("option1", "option2"))
    return Question(choices, int(item["answer"]) - 1)


def _sciq(item: Any) -> Question:
    context = f"{item['support']}\nQuestion: {item['question']}\nAnswer:".lstrip()
    names = ("distractor1", "distractor2", "distractor3", "correct_answer")
    return Question(tuple((context, f" {item[name]}") for name in names), 3)


def _lambada(item: Any) -> Question:
    return Question(((item["query"], f" {item['answers_text'][0]}"),), 0)


TASKS: dict[str, tuple[str, Callable[[Any], Question]]] = {
    "hellaswag": ("hellaswag_val.jsonl", _hellaswag),
    "piqa": ("piqa_val.jsonl", _piqa),
    "arc_easy": ("arc-easy_test.jsonl", _arc_easy),
    "winogrande": ("winogrande_xl_val.jsonl", _winogrande),
    "sciq": ("sciq_val.jsonl", _sciq),
    "lambada": ("lambada_openai_test.jsonl", _lambada),
}


def read(folder: Path, task: str, limit: int) -> list[Question]:
    """Up to `limit` questions of a task, the same for every model."""
    file, make = TASKS[task]
    lines = (folder / file).read_text(encoding="utf-8").split("\n")
    items = [json.loads(line) for line in lines if line.strip()]
    if len(items) > limit:
        items = random.Random(task).sample(items, limit)
    return [make(item) for item in items]


@dataclass(frozen=True)
class Prepared:
    """Questions, and for each of their choices the tokens and how many of the last ones count."""

    questions: list[Question]
    requests: list[tuple[list[int], int]]


def prepare(folder: Path, limit: int, tokenizer: Any) -> dict[str, Prepared]:
    """All tasks, tokenized once for all models."""
    found = {}
    for task in TASKS:
        questions = read(folder, task, limit)
        requests = [_request(tokenizer, *pair) for each in questions for pair in each.choices]
        found[task] = Prepared(questions, requests)
    return found


def accuracy(model: Any, prepared: Prepared) -> Mean:
    """The share of questions whose right choice is the likeliest (or, alone, the greedy one)."""
    questions = prepared.questions
    logs, greedy = likelihoods(model, prepared.requests)
    right, place = [], 0
    for each in questions:
        count = len(each.choices)
        if count == 1:
            right.append(float(greedy[place]))
        else:
            found = logs[place : place + count].clone()
            if each.by_bytes:
                sizes = [len(text.strip().encode()) for _, text in each.choices]
                found /= torch.tensor(sizes, dtype=found.dtype)
            right.append(float(int(found.argmax()) == each.answer))
        place += count
    return Mean.of(torch.tensor(right))


@torch.no_grad()
def likelihoods(model: Any, requests: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    """Log-likelihood of each row's last tokens, and if they are what the model would say.

    Args:
        model: of Transformers.
        requests: tokens, and how many of the last ones count.
    """
    model.eval()
    logs = torch.zeros(len(requests), dtype=torch.float64)
    greedy = torch.zeros(len(requests), dtype=torch.bool)
    for chosen, size in _batches(requests):
        # Padding comes after the text, where a causal model does not see it, and fills the batch:
        # FlexAttention is compiled for every shape.
        ids = torch.zeros(max(1, TOKENS // size), size, dtype=torch.int64)
        asked = torch.zeros_like(ids, dtype=torch.bool)
        for row, k in enumerate(chosen):
            tokens, count = requests[k][0][-size:], requests[k][1]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            asked[row, len(tokens) - count : len(tokens)] = True
        asked[:, 0] = False
        rows = asked.nonzero()[:, 0]
        wanted = ids[asked].to(model.device)
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        found = logits[:, :-1][asked[:, 1:].to(model.device)].float()
        each = -F.cross_entropy(found, wanted, reduction="none").double().cpu()
        hits = (found.argmax(dim=-1) == wanted).cpu()
        places = torch.tensor(chosen)[rows]
        logs.index_add_(0, places, each)
        greedy[chosen] = True
        greedy[places[~hits]] = False
    return logs, greedy


def _batches(requests: list[tuple[list[int], int]]) -> Iterator[tuple[list[int], int]]:
    """Indices of requests of one bucket, the same number each time, and the bucket's length."""
    for low, size in zip((0, *BUCKETS), BUCKETS):
        last = size == BUCKETS[-1]
        inside = [
            k
            for k, (ids, _) in enumerate(requests)
            if low < len(ids) and (last or len(ids) <= size)
        ]
        count = max(1, TOKENS // size)
        for start in range(0, len(inside), count):
            yield inside[start : start + count], size


def _request(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], int]:
    before = tokenizer(context, add_special_tokens=False)["input_ids"]
    whole = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    return whole, max(1, len(whole) - len(before))
