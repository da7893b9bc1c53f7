"""Prepared folders: training and validation tokens, their tokenizer, and facts about them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ..files import read_json, shown, sync_tree, write_atomically
from .arrays import open_array, save_array
from .text import read_documents, sample_path
from .token_file import SUFFIX, described_end_of_text, read_token_file
from .tokenizer import (
    TOKENIZER,
    end_of_text_id,
    entries_of,
    load_tokenizer,
    save_tokenizer,
    tokenize,
    train_tokenizer,
)
from .tokens import TokenStream

TRAINED = "byte-level BPE"  # tokenizer that was trained on the data
UNKNOWN = "unknown"  # tokenizer of a token file that came without one


@dataclass(frozen=True)
class CorpusFacts:
    """Facts about prepared data that go with the results: sources, sizes, digest, entropy."""

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
        data: text, JSON lines, a folder of these, or a token file; None for the sample that the
            package ships.
        vocabulary: entries of the tokenizer that is trained on the training documents. For packed
            tokens without a `tokenizer` the model gets at least as many entries as the stream
            needs.
        held_out: share of the documents that is kept for validation.
        tokenizer: a `tokenizer.json` to use instead; for a token file, the one that made it.
        end_of_text: the token between documents of a token file, see `read_token_file`.

    Raises:
        ValueError: if the data cannot be read, or an option does not go with it.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"`--held-out` must lie between 0 and 1, got {held_out}")
    used = load_tokenizer(tokenizer) if tokenizer else None
    if data is not None and data.name.endswith(SUFFIX):
        train, validation = read_token_file(data, end_of_text).hold_out(held_out)
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
            raise ValueError("`--end-of-text` is only for a token file, a tokenizer has its own")
        documents = read_documents(data or sample_path())
        kept, held = split_documents(documents, held_out)
        # The tokenizer must not know the validation text.
        used = used or train_tokenizer(kept, vocabulary)
        train, validation = tokenize(kept, used), tokenize(held, used)
        entries = entries_of(used)
        end_of_text = end_of_text_id(used)

    folder.mkdir(parents=True, exist_ok=True)
    for name, stream in (("train", train), ("validation", validation)):
        save_array(folder / f"{name}.tokens.npy", stream.tokens)
        save_array(folder / f"{name}.starts.npy", stream.starts)
    if used:
        save_tokenizer(used, folder / "tokenizer.json")
    return write_facts(
        folder,
        source="the sample of the package" if data is None else str(data),
        tokenizer=str(tokenizer) if tokenizer else (TRAINED if used else UNKNOWN),
        entries=entries,
        end_of_text=end_of_text,
        streams=[(s.num_documents, len(s), s.digest()) for s in (train, validation)],
    )


def write_facts(
    folder: Path,
    *,
    source: str,
    tokenizer: str,
    entries: int,
    end_of_text: int | None,
    streams: Sequence[tuple[int, int, str]],
) -> CorpusFacts:
    """Write what `open_facts` reads of a folder that is complete otherwise, and flush it to disk.
    Training and validation stream are given by documents, tokens and digest.
    """
    (train_documents, train_tokens, train), (documents, tokens, validation) = streams
    facts = CorpusFacts(
        source=source,
        tokenizer=tokenizer,
        # A multiple of 64 keeps the output layer's rows aligned.
        vocabulary=-(-entries // 64) * 64,
        train_documents=train_documents,
        train_tokens=train_tokens,
        validation_documents=documents,
        validation_tokens=tokens,
        unigram_entropy=stored_stream(folder, "validation").unigram_entropy() if tokens else 0.0,
        digest=f"{train[:16]}-{validation[:16]}",
        end_of_text=end_of_text,
    )
    write_atomically(folder / "facts.json", json.dumps(asdict(facts), indent=2) + "\n")
    sync_tree(folder)
    return facts


def open_facts(folder: Path) -> CorpusFacts:
    """The facts that `prepare` wrote; raises `ValueError` if the folder holds no such thing."""
    path = folder / "facts.json"
    try:
        found = read_json(path)
    except ValueError as error:
        raise ValueError(f"{folder} must be a folder that `prepare` wrote: {error}") from error
    names = {field.name for field in fields(CorpusFacts)}
    if not names - {"end_of_text"} <= found.keys() <= names:
        raise ValueError(
            f"{folder} must be a folder that `prepare` wrote: {path.name} must have the entries "
            f"{sorted(names)}, got {shown(sorted(found))}"
        )
    for name, value in found.items():
        if name in ("source", "tokenizer", "digest"):
            good, rule = isinstance(value, str), "a string"
        elif name == "unigram_entropy":
            good, rule = type(value) in (int, float) and 0 <= value < math.inf, "a finite number"
        else:
            good, rule = type(value) is int and 0 <= value < 2**63, "an integer from 0 on"
            good = good or (name == "end_of_text" and value is None)
        if not good:
            raise ValueError(f"{path}: `{name}` must be {rule}, got {shown(value)}")
    return CorpusFacts(**found)


def open_stream(folder: Path, name: str) -> TokenStream:
    """The stream "train" or "validation" of a prepared folder; see `PreparedFolder.stream`."""
    return PreparedFolder(folder).stream(name)


@dataclass(frozen=True)
class PreparedFolder:
    """A folder that `prepare` wrote; each of its files is read once, when it is asked for."""

    path: Path

    @cached_property
    def facts(self) -> CorpusFacts:
        """See `open_facts`."""
        return open_facts(self.path)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the tokens, if the folder has one."""
        file = self.path / TOKENIZER
        return load_tokenizer(file) if file.exists() else None

    def stream(self, name: str, *, check: bool = True) -> TokenStream:
        """The stream "train" or "validation", mapped into memory.

        With `check`, it is compared with its digest and with the tokenizer, which reads it once:
        about 1 s per GB.

        Raises:
            ValueError: if a file is missing, truncated, foreign, or not as it was written.
        """
        folder, facts = self.path, self.facts
        if name == "train":
            expected, place = (facts.train_tokens, facts.train_documents), 0
        else:
            expected, place = (facts.validation_tokens, facts.validation_documents), -1
        if not expected[0]:
            raise ValueError(
                f"{folder} must hold {name} tokens, but none were held out when it was prepared"
            )
        stream = stored_stream(folder, name)
        if (len(stream), stream.num_documents) != expected:
            raise ValueError(
                f"{folder} must hold {expected[0]} {name} tokens in {expected[1]} documents, got "
                f"{len(stream)} in {stream.num_documents}"
            )
        if check:
            digest, largest = stream.scan()
            wanted = facts.digest.split("-")[place]
            if not wanted or not digest.startswith(wanted):
                raise ValueError(
                    f"{folder / name}.tokens.npy and its starts must have the digest {wanted}, got "
                    f"{digest[:16]}: they are not as they were written"
                )
            entries = facts.vocabulary if self.tokenizer is None else entries_of(self.tokenizer)
            if largest >= entries:
                raise ValueError(
                    f"{folder / name}.tokens.npy must hold tokens below {entries}, the entries of "
                    f"its tokenizer, got {largest}"
                )
        return stream


def stored_stream(folder: Path, name: str) -> TokenStream:
    """The stream in a folder, mapped into memory, without a look at facts.json."""
    tokens = open_array(folder / f"{name}.tokens.npy", (np.uint16, np.uint32))
    starts = open_array(folder / f"{name}.starts.npy", (np.int64,))
    if len(starts) > len(tokens) + 1:  # before they are read into memory
        raise ValueError(
            f"{folder / name}.starts.npy must have at most one start per token and one more, got "
            f"{len(starts)} for {len(tokens)} tokens"
        )
    try:
        return TokenStream(tokens, np.array(starts))
    except ValueError as error:
        raise ValueError(f"{folder} must hold the stream {name!r}: {error}") from error


def split_documents(documents: list[str], held_out: float) -> tuple[list[str], list[str]]:
    """The split of `TokenStream.hold_out` for text; a single document is cut at a line's end."""
    if len(documents) == 1:
        (text,) = documents
        cut = text.find("\n", int(len(text) * (1 - held_out))) + 1
        if not 0 < cut < len(text):
            raise ValueError(
                "one document must have the end of a line near its end, where it is cut into "
                "training and validation text, got none"
            )
        return [text[:cut]], [text[cut:]]
    index = TokenStream.from_documents([np.array([k], np.uint32) for k in range(len(documents))])
    train, validation = index.hold_out(held_out)
    return [documents[k] for k in train.tokens], [documents[k] for k in validation.tokens]
