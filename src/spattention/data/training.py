"""What a recipe trains on: prepared folders and packed streams as datasets, checked at once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset, Dataset

from .packed import SUFFIX, described_end_of_text, read_packed
from .prepare import open_facts, open_stream
from .tokens import TokenStream, Windows


@dataclass(frozen=True)
class TrainingData:
    """Windows to train on and to be judged on.

    Attributes:
        train: windows of all training streams.
        validation: windows of the validation streams; None without any.
        tokens: training tokens.
        digest: of paths, sizes and settings: equal ones mean equal data.
        largest: the largest token of any stream.
        end_of_text: the token that ends a document, if it is known.
        tokenizer: the `tokenizer.json` that the data was made with, if it is known.
    """

    train: Dataset[Any]
    validation: Dataset[Any] | None
    tokens: int
    digest: str
    largest: int
    end_of_text: int | None
    tokenizer: Path | None


def open_training(
    data: Sequence[str],
    validation: Sequence[str],
    *,
    context: int,
    end_of_text: int | None = None,
    across_documents: bool = True,
    held_out: float = 0.005,
    limit: int | None = None,
) -> TrainingData:
    """Open and check everything that a run will read.

    Args:
        data: folders that `spattention prepare` wrote, and packed streams (`.u16.xz`).
        validation: the same, for the validation loss; if empty, what the folders hold out, or
            else a share of the streams.
        context: tokens per window.
        end_of_text: the token between documents of packed streams whose JSON does not name it.
        across_documents: see `Windows`.
        held_out: share of the documents of packed streams that is held out if `validation` is
            empty; 0 holds out none.
        limit: validation windows, spread over each stream; None for all.

    Raises:
        ValueError: if anything is missing, truncated, foreign, or shorter than a window.
    """
    if not data:
        raise ValueError("`data` must name at least one prepared folder or packed stream, got none")
    opened = [_open(Path(path), end_of_text) for path in data]
    trained, judged = [], []
    for path, stream in zip(map(Path, data), opened):
        if validation:
            trained.append(stream)
        elif path.is_dir():
            trained.append(stream)
            if open_facts(path).validation_tokens:
                judged.append(open_stream(path, "validation"))
        elif held_out:
            kept, held = stream.hold_out(held_out)
            trained.append(kept)
            judged.append(held)
        else:
            trained.append(stream)
    others = [_open(Path(path), end_of_text, "validation") for path in validation]
    judged += others
    train = [Windows(s, context, across_documents=across_documents) for s in trained]
    each = None if limit is None else max(1, limit // max(1, len(judged)))
    tests = [Windows(s, context, each, across_documents=across_documents) for s in judged]
    found = hashlib.sha256(repr((context, across_documents)).encode())
    for stream in (*trained, *judged):
        # Not the tokens themselves: a corpus may be larger than memory.
        found.update(repr((len(stream), stream.num_documents)).encode())
        found.update(stream.tokens[:4096].tobytes() + stream.tokens[-4096:].tobytes())
    folders = [Path(path) for path in data if Path(path).is_dir()]
    known = [_end_of_text(Path(path), end_of_text) for path in data]
    ends = {end for end in known if end is not None}
    if len(ends) > 1:
        raise ValueError(f"`data` must agree on the token that ends a document, got {sorted(ends)}")
    return TrainingData(
        train=ConcatDataset(train),
        validation=ConcatDataset(tests) if tests else None,
        tokens=sum(map(len, trained)),
        digest=found.hexdigest()[:16],
        largest=max(
            _largest(Path(path), stream)
            for path, stream in zip((*data, *validation), (*opened, *others))
        ),
        end_of_text=next(iter(ends), None),
        tokenizer=folders[0] / "tokenizer.json" if folders else None,
    )


def _open(path: Path, end_of_text: int | None, name: str = "train") -> TokenStream:
    if path.name.endswith(SUFFIX):
        return read_packed(path, end_of_text)
    if not path.is_dir():
        raise ValueError(
            f"`data` must be folders that `spattention prepare` wrote or packed streams ({SUFFIX}),"
            f" got {path}"
        )
    facts, stream = open_facts(path), open_stream(path, name)
    expected = facts.train_tokens if name == "train" else facts.validation_tokens
    if len(stream) != expected:
        raise ValueError(f"{path} must hold {expected} {name} tokens, got {len(stream)}")
    return stream


def _end_of_text(path: Path, of_streams: int | None) -> int | None:
    if path.is_dir():
        return open_facts(path).end_of_text
    return described_end_of_text(path) if of_streams is None else of_streams


def _largest(path: Path, stream: TokenStream) -> int:
    """The largest token; of a prepared folder the largest that its tokenizer has (the vocabulary
    in its facts is rounded up).
    """
    if not path.is_dir():
        return int(stream.tokens.max())
    from .tokenizer import load_tokenizer

    return max(load_tokenizer(path / "tokenizer.json").get_vocab().values())
