"""From a path to what a run trains on: training and validation tokens, and the tokenizer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .packed import SUFFIX, described_end_of_text, read_packed
from .text import read_documents, sample_path
from .tokenizer import end_of_text_id, entries_of, load_tokenizer, tokenize, train_tokenizer
from .tokens import TokenStream


@dataclass(frozen=True)
class CorpusFacts:
    """What a reader of the results has to know about the data."""

    source: str
    tokenizer: str
    vocabulary: int
    train_documents: int
    train_tokens: int
    validation_documents: int
    validation_tokens: int
    unigram_entropy: float
    digest: str
    end_of_text: int | None = None  # the token that ends a document, if it is known


def prepare(
    folder: Path,
    data: Path | None,
    *,
    vocabulary: int,
    held_out: float,
    tokenizer: Path | None = None,
    end_of_text: int | None = None,
) -> CorpusFacts:
    """Read, split and tokenize; write memory-mappable tokens, the tokenizer, and the facts.

    Args:
        folder: where `open_stream` finds the result.
        data: text, JSON lines, a folder of these, or packed tokens; None for the sample that the
            package ships.
        vocabulary: entries of the tokenizer that is trained on the training documents. For packed
            tokens without a `tokenizer` the model gets at least as many entries as the stream
            needs.
        held_out: share of the documents that is kept for validation.
        tokenizer: a `tokenizer.json` to use instead; for packed tokens, the one that made them.
        end_of_text: the token between documents of packed tokens, see `read_packed`.

    Raises:
        ValueError: if the data cannot be read, or an option does not go with it.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"`held_out` must lie between 0 and 1, got {held_out}")
    used = load_tokenizer(tokenizer) if tokenizer else None
    if data is not None and data.name.endswith(SUFFIX):
        train, validation = read_packed(data, end_of_text).hold_out(held_out)
        if end_of_text is None:
            end_of_text = described_end_of_text(data)
        largest = int(max(train.tokens.max(), validation.tokens.max()))
        entries = entries_of(used) if used else largest + 1
        if largest >= entries:
            raise ValueError(
                f"{data} must hold tokens of the tokenizer's {entries} entries, got token {largest}"
            )
    else:
        if end_of_text is not None:
            raise ValueError("`end_of_text` is only for packed tokens, a tokenizer has its own")
        documents = read_documents(data or sample_path())
        kept, held = split_documents(documents, held_out)
        # The tokenizer must not know the text that it is judged on.
        used = used or train_tokenizer(kept, vocabulary)
        train, validation = tokenize(kept, used), tokenize(held, used)
        entries = entries_of(used)
        end_of_text = end_of_text_id(used)

    folder.mkdir(parents=True, exist_ok=True)
    for name, stream in (("train", train), ("validation", validation)):
        np.save(folder / f"{name}.tokens.npy", stream.tokens)
        np.save(folder / f"{name}.starts.npy", stream.starts)
    if used:
        used.save(str(folder / "tokenizer.json"))
    facts = CorpusFacts(
        source="the sample of the package" if data is None else str(data),
        tokenizer=str(tokenizer) if tokenizer else ("byte-level BPE" if used else "unknown"),
        # A multiple of 64 keeps the output layer's rows aligned.
        vocabulary=-(-entries // 64) * 64,
        train_documents=train.num_documents,
        train_tokens=len(train),
        validation_documents=validation.num_documents,
        validation_tokens=len(validation),
        unigram_entropy=validation.unigram_entropy(),
        digest=f"{train.digest()[:16]}-{validation.digest()[:16]}",
        end_of_text=end_of_text,
    )
    (folder / "facts.json").write_text(json.dumps(asdict(facts), indent=2) + "\n")
    return facts


def open_facts(folder: Path) -> CorpusFacts:
    """The facts that `prepare` wrote; raises `ValueError` if the folder holds no such thing."""
    try:
        return CorpusFacts(**json.loads((folder / "facts.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{folder} must be a folder that `prepare` wrote: {error}") from error


def open_stream(folder: Path, name: str) -> TokenStream:
    """The stream "train" or "validation" that `prepare` wrote, mapped into memory, not read.

    Raises:
        ValueError: if a file is missing, truncated or foreign.
    """
    try:
        tokens = np.load(folder / f"{name}.tokens.npy", mmap_mode="r")
        return TokenStream(tokens, np.load(folder / f"{name}.starts.npy"))
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{folder} must hold the stream {name!r} as `prepare` wrote it: {error}"
        ) from error


def split_documents(documents: list[str], held_out: float) -> tuple[list[str], list[str]]:
    """The split of `TokenStream.hold_out` for text; a single document is cut at a line's end."""
    if len(documents) == 1:
        (text,) = documents
        cut = text.find("\n", int(len(text) * (1 - held_out))) + 1
        if not 0 < cut < len(text):
            raise ValueError("one document without a line's end near its end cannot be split")
        return [text[:cut]], [text[cut:]]
    index = TokenStream.from_documents([np.array([k], np.uint32) for k in range(len(documents))])
    train, validation = index.hold_out(held_out)
    return [documents[k] for k in train.tokens], [documents[k] for k in validation.tokens]
