"""Options of `spattention fit`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ...files import check_local


@dataclass(frozen=True)
class Options:
    """Fit bands to a pretrained dense model, and save the model with them.

    The model's attention is measured on some rows of text, how much the loss minds to lose it, and
    which heads fetch passkeys planted in them. The budget of pairs then goes to the heads and
    distances that the loss and the answers mind most. Other rows check the result. No weight
    changes: train the model afterwards, as docs/finetuning.md describes.

    The output folder opens with Transformers after `spattention.hf.register()`. It also holds the
    profile (profile.json, profile.png), and what each layer got and why (fit.md, fit.png,
    fit.json). It appears when it is complete. Code that comes with a model is never run.

    Args:
        model: Folder of a saved dense model, or its name on the Hugging Face hub.
        output: Folder for the result; it must not exist.
        pairs: Budget: share of dense attention's pairs at the context.
        data: Text (.txt, .jsonl, or a folder of them), a token file (.u16.xz), or a folder that
            `spattention prepare` wrote with the model's tokenizer. Without it, the books that the
            package ships.
        context: Tokens per row; default 2048, or the model's longest input if that is shorter.
        rows: Rows to profile.
        check: Other rows, to check captured attention and loss on.
        needles: Passkeys to plant; 0 for none.
        retrieval: Weight of what answers mind of their passkeys, beside the loss: from 0 to 1.
        profile: A profile.json of this model to use instead of a new one.
        span: Span of the patterns; default the model's longest input.
        sensitivity: Profiled rows of which the gradient is taken too, all of them if they are
            fewer, to spend the budget where the loss minds most; 0 spends it where most attention
            is captured.
        prefix: First tokens that every head attends, at most 16.
        local: Nearest tokens that every head attends at least; default 64, or half of the window
            that the budget allows.
        share: Give all query heads of one key/value head the same bands.
        dense_layers: Layers that stay dense throughout.
        sinks: Give each head a learned sink, which starts from the measured score of the first
            tokens.
        dtype: The dtype of the weights, auto for that of the checkpoint.
    """

    model: Annotated[str, tyro.conf.Positional]
    output: Path
    pairs: float = 0.35
    data: Path | None = None
    context: int | None = None
    rows: int = 16
    check: int = 4
    needles: int = 16
    sensitivity: int = 8
    retrieval: float = 0.1
    profile: Path | None = None
    span: int | None = None
    prefix: int = 4
    local: int | None = None
    share: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    dense_layers: tuple[int, ...] = ()
    sinks: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


def check(options: Options) -> None:
    """Find the model and the data, where these are paths."""
    check_local(options.model, "`MODEL` must be a saved model or a name on the hub")
    if options.data is not None and not options.data.exists():
        raise ValueError(
            f"`--data` must be text or tokens, {options.data} is neither a file nor a folder"
        )
