"""Retrieval of a language model at its whole context: passkeys, RULER's needles and variables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.conversion.measure import passkeys, ruler_scores
from spattention.data.tokenizer import for_transformers, load_tokenizer
from spattention.evaluation.ruler import NEW_TOKENS


def retrieval(model: Any, windows: Any, tokenizer: Path, prompts: int) -> dict[str, Any]:
    """Scores of a trained model.

    Args:
        model: of Transformers.
        windows: held-out windows of the model's context, which needles are hidden in.
        tokenizer: `tokenizer.json` of the data.
        prompts: per task, and passkeys per depth.

    Returns:
        `passkeys` by depth, `ruler` by task, each at `lengths` in tokens: the whole context, less
        what is generated.
    """
    context = len(windows[0]["input_ids"])
    room = context - max(NEW_TOKENS.values())
    rows = torch.stack([windows[k % len(windows)]["input_ids"] for k in range(prompts)])
    used = for_transformers(load_tokenizer(tokenizer), context, model.config.eos_token_id)
    return {
        "lengths": {"passkeys": context, "ruler": room},
        "passkeys": passkeys(model, used, rows, context, prompts),
        "ruler": ruler_scores(model, used, rows, room, prompts),
    }
