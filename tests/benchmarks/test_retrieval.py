"""Passkeys and RULER's tasks of a model at its whole context."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.experiments.retrieval import retrieval
from spattention.data.tokenizer import entries_of, save_tokenizer, train_tokenizer
from spattention.evaluation.ruler import TASKS
from spattention.models import build, preset

CONTEXT = 1024


def test_a_model_is_asked_at_its_whole_context(tmp_path: Path) -> None:
    """Prompts leave room for their answers, and every task has a score."""
    text = "It was a bright cold day in April. The clocks were striking thirteen! " * 200
    tokenizer = train_tokenizer([text, "0123456789"], 400)
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    ids = torch.tensor(tokenizer.encode(text).ids * 4)[: 2 * CONTEXT].view(2, CONTEXT)
    sizes = {"vocab_size": entries_of(tokenizer), "context": CONTEXT, "num_layers": 1}
    model = build(preset("olmoe-tiny", **sizes))
    model.config.eos_token_id = tokenizer.token_to_id("<|endoftext|>")
    longest = []
    model.register_forward_pre_hook(
        lambda module, args, keywords: longest.append(keywords["input_ids"].shape[1]),
        with_kwargs=True,
    )
    windows = [{"input_ids": row} for row in ids]
    found = retrieval(model, windows, tmp_path / "tokenizer.json", 1)
    assert found["lengths"] == {"passkeys": CONTEXT, "ruler": CONTEXT - 128}
    assert max(longest) == CONTEXT
    assert list(found["passkeys"]) == ["0.1", "0.3", "0.5", "0.7", "0.9"]
    assert list(found["ruler"]) == list(TASKS)
    assert all(0 <= score["mean"] <= 1 for score in found["ruler"].values())
