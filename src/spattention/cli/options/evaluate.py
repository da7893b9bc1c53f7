"""Options of `spattention evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ...files import check_folder

Part = Literal["loss", "recall", "heads", "tasks"]


@dataclass(frozen=True)
class Options:
    """Evaluate a trained causal language model, with bands, a baseline or dense attention.

    Four parts: the validation loss, overall and by position in the context; recall (copying, pairs
    of keys and values, a needle at each depth of the context); the entropy, the distance and the
    divergence of the heads; and tasks of the lm-evaluation-harness, with --tasks, which needs
    spattention[eval]. Scores come with standard errors; a score within two of them of guessing is
    called near chance, a lower one below chance. Code that comes with a model is never run.

    Args:
        checkpoint: Folder of a saved model, of `spattention train` (its newest checkpoint that is
            whole), or of `spattention compare` (its first model with bands).
        data: Held-out text: .txt or .jsonl (also .gz, .zst, or a folder of these), a token file
            (.u16.xz), or a folder that `spattention prepare` wrote, of which the validation tokens
            are taken. Without it, those of the model's own run.
        parts: The parts to evaluate; default all that need no --tasks, and tasks if they are given.
        context: Tokens per window; default the model's longest input.
        windows: Upper bound on the number of windows, which are spread over the text.
        items: Sequences per question of recall.
        batch: Windows at a time.
        dtype: The dtype of the weights.
        tasks: hellaswag, winogrande, copa, piqa, arc_easy, arc_challenge, lambada_openai, mmlu;
            from the hub any of the harness.
        task_data: Folder of JSON lines to take the items from; without it, the hub.
        shots: Numbers of examples in the prompt, such as 0 5; local files have them for mmlu alone.
        limit: Upper bound on the number of items per task, for a first look.
        seed: RNG seed of the random tokens of recall.
        output: Folder for evaluation.json, evaluation.md and evaluation.png.
        replace: Replace what the output folder holds of another model or of other parts.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    data: Path | None = None
    parts: tuple[Part, ...] = ()
    context: int | None = None
    windows: int = 64
    items: int = 16
    batch: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    shots: tuple[int, ...] = (0,)
    limit: int | None = None
    seed: int = 0
    output: Path = Path("spattention-evaluate")
    replace: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def check(options: Options) -> None:
    """Find the model's folder."""
    check_folder(options.checkpoint)
