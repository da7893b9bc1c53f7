"""Measurements of one model: held-out loss, passkeys, RULER's tasks, zero-shot tasks, speed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from spattention.evaluation import ruler
from spattention.evaluation.perplexity import validation_loss
from spattention.hf.needles import Needle, plant

from . import choices
from .speed import memory, speed
from .text import Text

TOKENS = 32_768  # of a batch
EDGES = (128, 512, 1024, 2048, 4096)  # positions that divide a window's losses
ANSWERED = 8 * TOKENS  # tokens of prompts that are answered together: a step costs the host's time
DEPTHS = 5  # .1, .3, .5, .7, .9
PARTS = ("loss", "passkeys", "ruler", "tasks", "speed", "memory")


@dataclass(frozen=True)
class Sizes:
    """What is measured, the same for every row.

    Attributes:
        parts: of `PARTS`.
        passkey_lengths: tokens per row.
        trials: passkeys per length and depth.
        ruler_lengths: tokens per prompt.
        ruler_items: prompts per length and task.
        tasks: zero-shot tasks.
        speed_lengths: tokens of a text that is read at once; while decoding, of the longest.
        speed_rows: texts that are decoded together.
    """

    parts: tuple[str, ...]
    passkey_lengths: tuple[int, ...]
    trials: int
    ruler_lengths: tuple[int, ...]
    ruler_items: int
    tasks: dict[str, choices.Prepared]
    speed_lengths: tuple[int, ...]
    speed_rows: int


def measure(model: Any, tokenizer: Any, text: Text, sizes: Sizes) -> dict[str, Any]:
    """All parts that are asked for."""
    found: dict[str, Any] = {}
    if "loss" in sizes.parts:
        found["loss"] = {name: _loss(model, rows) for name, rows in text.held_out.items()}
    if "passkeys" in sizes.parts:
        found["passkeys"] = {
            str(length): passkeys(model, tokenizer, text.long, length, sizes.trials)
            for length in sizes.passkey_lengths
        }
    if "ruler" in sizes.parts:
        found["ruler"] = {
            str(length): ruler_scores(model, tokenizer, text.long, length, sizes.ruler_items)
            for length in sizes.ruler_lengths
        }
    if "tasks" in sizes.parts:
        found["tasks"] = {
            task: asdict(choices.accuracy(model, prepared))
            for task, prepared in sizes.tasks.items()
        }
    if "speed" in sizes.parts:
        found["speed"] = speed(model, text.long, sizes.speed_lengths, sizes.speed_rows)
    if "memory" in sizes.parts:
        found["memory"] = memory(model, text.long, max(sizes.speed_lengths))
    return found


def _loss(model: Any, rows: Tensor) -> dict[str, Any]:
    context = rows.shape[1]
    edges = (1, *(edge for edge in EDGES if edge < context), context)
    windows = [{"input_ids": row} for row in rows]
    found = validation_loss(model, windows, batch=max(1, TOKENS // context), edges=edges)
    return {
        "mean": found.loss.mean,
        "error": found.loss.error,
        "edges": list(edges),
        "parts": [part.mean for part in found.parts],
    }


@torch.no_grad()
def passkeys(
    model: Any, tokenizer: Any, long: Tensor, length: int, trials: int
) -> dict[str, float]:
    """Share of passkeys repeated exactly, by depth from 0 to 1."""
    model.eval()
    needles: list[Needle] = []
    for trial in range(trials):
        row = _haystack(long, trial, length)
        needles += plant([row] * DEPTHS, DEPTHS, tokenizer, seed=trial)
    hits = []
    batch = max(1, TOKENS // length)
    for start in range(0, len(needles), batch):
        chosen = needles[start : start + batch]
        keep = max(len(each.answer) for each in chosen) + 1
        # Full batches alone: FlexAttention is compiled for every shape.
        full = [*chosen, *chosen[:1] * (min(batch, len(needles)) - len(chosen))]
        ids = torch.stack([each.tokens for each in full]).to(model.device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
        said = logits.argmax(dim=-1).cpu()
        for row, each in zip(said, chosen):
            own = row[keep - 1 - len(each.answer) : keep - 1]
            hits.append(bool(torch.equal(own, each.answer_tokens)))
    table = torch.tensor(hits, dtype=torch.float64).view(trials, DEPTHS).mean(dim=0).tolist()
    return {str((2 * k + 1) / (2 * DEPTHS)): share for k, share in enumerate(table)}


def ruler_scores(
    model: Any, tokenizer: Any, long: Tensor, length: int, count: int
) -> dict[str, Any]:
    haystacks = [_haystack(long, k, length) for k in range(count)]
    scores: dict[str, Any] = {}
    for task in ruler.TASKS:
        items = ruler.make_items(task, haystacks, length, tokenizer)
        scores[task] = asdict(ruler.ask(model, items, tokenizer, batch=max(1, ANSWERED // length)))
    return scores


def _haystack(long: Tensor, number: int, length: int) -> Tensor:
    """`length` tokens of a long row, another part each time round."""
    row, part = number % len(long), number // len(long)
    room = long.shape[1] - length
    start = 0 if not room else part * length % (room + 1)
    return long[row, start : start + length]
