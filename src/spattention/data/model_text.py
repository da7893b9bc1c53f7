"""Tokens for a model that has a tokenizer: of text, prepared folders and token files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .prepare import open_stream
from .text import iterate_documents, text_kind
from .token_file import SUFFIX, read_token_file
from .tokenizer import load_tokenizer
from .tokens import TokenStream


def is_text(path: Path) -> bool:
    """True for a text file, and for a folder that holds one."""
    if path.is_dir():
        return any(text_kind(file) for file in path.iterdir())
    return path.is_file() and text_kind(path) is not None


def tokenize_text(path: Path, tokenizer: Any, enough: int | None = None) -> TokenStream:
    """The documents of text files (see `iterate_documents`), each with an end of text where the
    tokenizer of Transformers has one; once there are `enough` tokens, no more are read."""
    found: list[np.ndarray] = []
    size = 0
    for text in iterate_documents(path):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            ids = [*ids, tokenizer.eos_token_id]
        found.append(np.array(ids, np.uint32))
        size += len(ids)
        if enough is not None and size >= enough:
            break
    return TokenStream.from_documents(found)


def check_same_tokenizer(data: Path, vocabulary: dict[str, int]) -> None:
    """Check that a prepared folder was made with a model's tokenizer, where it holds one; raises
    `ValueError`."""
    file = data / "tokenizer.json"
    if file.is_file() and load_tokenizer(file).get_vocab() != vocabulary:
        raise ValueError(
            f"`--data` must be prepared with the model's tokenizer, {data} was with another"
        )


def open_tokens(data: Path, name: str) -> TokenStream:
    """The stream in a token file, or the stream of this name in a prepared folder."""
    return read_token_file(data) if data.name.endswith(SUFFIX) else open_stream(data, name)
