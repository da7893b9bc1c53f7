"""Tokenize packed streams again, with a byte-level BPE of another vocabulary trained on them.

    python -m benchmarks.experiments.vocabulary --data streams --output streams-8192

The streams keep their names. The tokenizer is trained, by the `tokenizers` library, on documents of
the training streams that a seed draws, `SAMPLE` characters of each stream; validation streams are
the `val_*`. The output has `tokenizer.json`, the streams, and `vocabulary.json`, which names the
digests of what was read and written. A stream that is there already is not made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import tyro
from tokenizers import Tokenizer

from spattention.data.token_file import (
    SUFFIX,
    described_end_of_text,
    read_token_file,
    write_token_file,
)
from spattention.data.tokenizer import (
    DocumentEncoder,
    end_of_text_id,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from spattention.data.tokens import TokenStream
from spattention.files import write_atomically

SAMPLE = 8_000_000  # characters of a stream that the tokenizer is trained on
PIECE = 200_000  # characters that are encoded at a time; whole books are slow
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Options:
    """Train a tokenizer on packed streams and tokenize them with it.

    Args:
        data: Folder of the streams (.u16.xz) and of their tokenizer.
        output: Folder to write.
        old: Tokenizer of the streams; by default `tokenizer_olmo.json` in their folder.
        vocabulary: Entries of the new one.
        streams: Names of the streams, without .u16.xz; all without it.
        end_of_text: Token between documents of streams whose JSON does not name it.
        seed: Of the documents that the tokenizer is trained on.
        processes: Streams at a time.
        tokens: The first tokens of each stream alone, up to the end of a document; 0 for all.
    """

    data: Path
    output: Path
    old: Path | None = None
    vocabulary: int = 8192
    streams: tuple[str, ...] = ()
    end_of_text: int = 50279
    seed: int = 0
    processes: int = max(1, (os.cpu_count() or 1) // 2)
    tokens: int = 0


def main(options: Options) -> None:
    """Make the tokenizer, then the streams that are missing."""
    names = options.streams or tuple(
        sorted(path.name.removesuffix(SUFFIX) for path in options.data.glob(f"*{SUFFIX}"))
    )
    if not names:
        raise ValueError(
            f"`--data` must be a folder of streams ({SUFFIX}), {options.data} has none"
        )
    training = [name for name in names if not name.startswith("val_")]
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / TOKENIZER
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        if not path.exists():
            if not training:
                raise ValueError(f"`--streams` must have one to train on, got {list(names)}")
            parts = pool.map(sample, [options] * len(training), training)
            documents = [text for part in parts for text in part]
            save_tokenizer(train_tokenizer(documents, options.vocabulary), path)
            print(f"{path}: trained on {sum(map(len, documents)):,} characters", flush=True)
        facts = {}
        for name, fact in zip(names, pool.map(encode, [options] * len(names), names)):
            facts[name] = fact
            print(f"{name}: {fact['tokens']:,} tokens for {fact['tokens_before']:,}", flush=True)
    content = {
        "vocabulary": options.vocabulary,
        "seed": options.seed,
        "tokenizer": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
        "streams": facts,
    }
    write_atomically(options.output / "vocabulary.json", json.dumps(content, indent=1) + "\n")


def sample(options: Options, name: str) -> list[str]:
    """Documents of a stream for the tokenizer, about `SAMPLE` characters of them."""
    stream, old = _open(options, name)
    order = list(range(stream.num_documents))
    random.Random(f"{options.seed} {name}").shuffle(order)
    found, count = [], 0
    for number in order:
        text = _text(stream, number, old)[: SAMPLE // 8]  # no book is more than an eighth
        found.append(text)
        count += len(text)
        if count >= SAMPLE:
            break
    return found


def encode(options: Options, name: str) -> dict[str, int | str]:
    """Write a stream with the new tokenizer, unless it is there; facts of both."""
    stream, old = _open(options, name)
    path = options.output / f"{name}{SUFFIX}"
    new = load_tokenizer(options.output / TOKENIZER)
    end = end_of_text_id(new)
    if not path.exists():
        encoder = DocumentEncoder(new, end)
        documents = []
        for number in range(stream.num_documents):
            text = _text(stream, number, old)
            pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)] or [""]
            # Each piece ends with the end of text; the document has one, at its end.
            parts = encoder.encode(pieces)
            ids = parts.tokens[parts.tokens != end]
            documents.append(np.append(ids, np.array([end], ids.dtype)))
        write_token_file(path, TokenStream.from_documents(documents), end)
    made = read_token_file(path)
    return {
        "tokens_before": len(stream),
        "digest_before": stream.digest()[:16],
        "tokens": len(made),
        "documents": made.num_documents,
        "digest": made.digest()[:16],
    }


def _open(options: Options, name: str) -> tuple[TokenStream, Tokenizer]:
    path = options.data / f"{name}{SUFFIX}"
    end = described_end_of_text(path)
    stream = read_token_file(path, options.end_of_text if end is None else end)
    if options.tokens:
        count = max(1, int(np.searchsorted(stream.starts, options.tokens, side="right")) - 1)
        stream = stream.take(range(count))
    return stream, load_tokenizer(options.old or options.data / "tokenizer_olmo.json")


def _text(stream: TokenStream, number: int, old: Tokenizer) -> str:
    ids = stream.tokens[stream.starts[number] : stream.starts[number + 1]]
    return old.decode(ids.tolist())  # leaves out the end of text, a special token


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
