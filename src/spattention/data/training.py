"""Datasets of a recipe: windows of prepared folders and token files, checked when opened."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset, Dataset

from .prepare import UNKNOWN, open_facts, open_stream
from .token_file import SUFFIX, described_end_of_text, read_token_file
from .tokens import TokenStream, Windows

LARGE = 4 * 10**9  # bytes of tokens
BLOCK, BLOCKS = 4096, 64  # tokens of a block, and blocks of a stream, that `contents` is made of


@dataclass(frozen=True)
class TrainingData:
    """Windows for training and validation.

    Attributes:
        train: windows of all training streams.
        validation: windows of the validation streams; None without any.
        tokens: training tokens.
        digest: digest of sizes, settings and both ends of each stream; names the data in results.
        contents: digest of sampled blocks of the training and validation tokens. A run can resume
            only if it matches.
        largest: the largest token of any stream.
        end_of_text: the token that ends a document, if it is known.
        tokenizer: the `tokenizer.json` that the data was made with, if it is known.
    """

    train: Dataset[Any]
    validation: Dataset[Any] | None
    tokens: int
    digest: str
    contents: str
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
    check: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> TrainingData:
    """Open and check everything that a run will read.

    Args:
        data: folders that `spattention prepare` wrote, and token files (`.u16.xz`).
        validation: the same, for the validation loss; if empty, what the folders hold out, or
            else a share of the streams.
        context: tokens per window.
        end_of_text: the token between documents of token files whose JSON does not name it.
        across_documents: see `Windows`.
        held_out: share of the documents of token files that is held out if `validation` is
            empty; 0 holds out none.
        limit: validation windows, spread over each stream; None for all.
        check: compare the tokens of prepared folders with their digests, see `open_stream`.
        say: called before that where it takes more than a few seconds.

    Raises:
        ValueError: if anything is missing, truncated, foreign, not as it was written, or shorter
            than a window.
    """
    if not data:
        raise ValueError("`data` must name at least one prepared folder or token file, got none")
    size = sum(file.stat().st_size for path in data for file in Path(path).glob("*.tokens.npy"))
    if check and size > LARGE:
        say(f"comparing {size / 1e9:.1f} GB of tokens with their digests")
    opened = [_open(Path(path), end_of_text, check=check) for path in data]
    trained, validated, sources = [], [], list(validation)
    for path, stream in zip(map(Path, data), opened):
        if validation:
            trained.append(stream)
        elif path.is_dir():
            trained.append(stream)
            if open_facts(path).validation_tokens:
                validated.append(open_stream(path, "validation", check=check))
                sources.append(f"{path}: prepare it again with a larger `--held-out`")
        elif held_out:
            kept, held = stream.hold_out(held_out)
            trained.append(kept)
            validated.append(held)
            sources.append(f"{path}: a larger `held_out` keeps more")
        else:
            trained.append(stream)
    others = [_open(Path(path), end_of_text, "validation", check=check) for path in validation]
    validated += others
    for source, stream in zip(sources, validated):
        if len(stream) < context:
            raise ValueError(
                f"`context` must be at most the number of validation tokens, got {context}, and "
                f"{len(stream)} in {source}"
            )
    train = [Windows(s, context, across_documents=across_documents) for s in trained]
    tests = [
        Windows(s, context, each, across_documents=across_documents)
        for s, each in zip(validated, _shares(limit, len(validated)))
    ]
    found = hashlib.sha256(repr((context, across_documents)).encode())
    for stream in (*trained, *validated):
        # Not the tokens themselves: a corpus may be larger than memory.
        found.update(repr((len(stream), stream.num_documents)).encode())
        found.update(stream.tokens[:4096].tobytes() + stream.tokens[-4096:].tobytes())
    folders = [Path(path) for path in data if Path(path).is_dir()]
    _check_tokenizers([*folders, *(Path(path) for path in validation if Path(path).is_dir())])
    known = [_end_of_text(Path(path), end_of_text) for path in data]
    ends = {end for end in known if end is not None}
    if len(ends) > 1:
        raise ValueError(f"`data` must agree on the token that ends a document, got {sorted(ends)}")
    return TrainingData(
        train=ConcatDataset(train),
        validation=ConcatDataset(tests) if tests else None,
        tokens=sum(map(len, trained)),
        digest=found.hexdigest()[:16],
        contents=_contents(train, tests),
        largest=max(
            _largest(Path(path), stream)
            for path, stream in zip((*data, *validation), (*opened, *others))
        ),
        end_of_text=next(iter(ends), None),
        tokenizer=next(filter(None, map(_tokenizer, folders)), None),
    )


def _shares(limit: int | None, streams: int) -> list[int | None]:
    """Number of validation windows per stream: `limit` in all, at least one of each."""
    if limit is None:
        return [None] * streams
    edges = [k * limit // streams for k in range(streams + 1)] if streams else [0]
    return [max(1, end - begin) for begin, end in zip(edges, edges[1:])]


def _contents(train: Sequence[Windows], tests: Sequence[Windows]) -> str:
    """A digest of blocks of tokens all over the streams; a corpus may be larger than memory."""
    found = hashlib.sha256()
    for windows in (train, tests):
        found.update(b"streams" + len(windows).to_bytes(8, "little"))
        for part in windows:
            stream = part.stream
            count, last = len(stream), max(0, len(stream) - BLOCK)
            found.update(repr((count, stream.num_documents, len(part))).encode())
            for start in sorted({last * k // (BLOCKS - 1) for k in range(BLOCKS)}):
                block = stream.tokens[start : start + BLOCK]
                found.update(block.astype("<u4").tobytes())
    return found.hexdigest()[:16]


def _check_tokenizers(folders: Sequence[Path]) -> None:
    """Raise ValueError if the folders have different tokenizers."""
    from .tokenizer import load_tokenizer

    known = [path for path in map(_tokenizer, folders) if path is not None]
    vocabularies = [load_tokenizer(path).get_vocab() for path in known]
    for path, tokens in zip(known, vocabularies):
        if tokens != vocabularies[0]:
            raise ValueError(
                "`data` and `validation` must be made with one tokenizer, those of "
                f"{known[0].parent} and {path.parent} are not the same"
            )


def _tokenizer(folder: Path) -> Path | None:
    """The tokenizer of a prepared folder; None for one of a token file without any."""
    return None if open_facts(folder).tokenizer == UNKNOWN else folder / "tokenizer.json"


def _open(path: Path, end_of_text: int | None, name: str = "train", *, check: bool) -> TokenStream:
    if path.name.endswith(SUFFIX):
        return read_token_file(path, end_of_text)
    if not path.is_dir():
        raise ValueError(
            f"`{'data' if name == 'train' else name}` must be folders that `spattention prepare` "
            f"wrote or token files ({SUFFIX}), got {path}"
        )
    return open_stream(path, name, check=check)


def _end_of_text(path: Path, of_streams: int | None) -> int | None:
    if path.is_dir():
        return open_facts(path).end_of_text
    return described_end_of_text(path) if of_streams is None else of_streams


def _largest(path: Path, stream: TokenStream) -> int:
    """The largest token; of a prepared folder the largest that its tokenizer has (the vocabulary
    in its facts is rounded up).
    """
    tokenizer = _tokenizer(path) if path.is_dir() else None
    if tokenizer is None:
        return int(stream.tokens.max())
    from .tokenizer import entries_of, load_tokenizer

    return entries_of(load_tokenizer(tokenizer)) - 1
