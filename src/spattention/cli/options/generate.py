"""Options of `spattention generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ...files import check_folder


@dataclass(frozen=True)
class Options:
    """Continue a text with a model that was trained here, or with any saved causal language model.

    The text is shown as it comes; the speed and the size of the cache of keys and values follow at
    the end. A model with bands keeps what its bands reach (`BandCache`), any other every token.
    Code that comes with a model is never run.

    Args:
        folder: Folder of a saved model, of `spattention train` (its newest checkpoint that is
            whole), or the output folder of `spattention compare`: its first model with bands is
            taken.
        prompt: Text to continue.
        file: Text file to continue, instead of a prompt.
        max_new_tokens: Tokens to add; fewer if the model ends the text, or if its context is full.
        temperature: How freely tokens are drawn, from 0.01 to 100; 0 always takes the likeliest.
        top_k: Draw among this number of the likeliest tokens.
        seed: RNG seed of the draws.
        compare: dense continues the text a second time, with the same weights, PyTorch's dense
            attention and a cache of every token, and shows both speeds and sizes.
        compile: Compile decoding on a GPU: a minute at first, and faster tokens from then on.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    prompt: Annotated[str | None, tyro.conf.Positional] = None
    file: Path | None = None
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 50
    seed: int = 0
    compare: Literal["dense"] | None = None
    compile: bool = False


def check(options: Options) -> None:
    """Find the model's folder, and one text."""
    check_folder(options.folder)
    if (options.prompt is None) == (options.file is None):
        raise ValueError("give a prompt or --file, one of them")
