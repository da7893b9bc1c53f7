"""Datasets of a recipe: windows of prepared folders and token files, checked when opened."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch.utils.data import ConcatDataset, Dataset

from ..files import near_path
from .prepare import UNKNOWN, PreparedFolder
from .token_file import SUFFIX, described_end_of_text, read_token_file
from .tokenizer import TOKENIZER, entries_of, load_tokenizer
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
        check: compare the tokens of prepared folders with their digests, see `PreparedFolder`.
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
    for path, (folder, stream) in zip(map(Path, data), opened):
        if not validation and folder is None and held_out:
            stream, held = stream.hold_out(held_out)
            validated.append(held)
            sources.append(f"{path}: a larger `held_out` keeps more")
        elif not validation and folder is not None and folder.facts.validation_tokens:
            validated.append(folder.stream("validation", check=check))
            sources.append(f"{path}: prepare it again with a larger `--held-out`")
        trained.append(stream)
    others = [_open(Path(path), end_of_text, "validation", check=check) for path in validation]
    validated += [stream for _, stream in others]
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
    # Folders that were made of token files may have no tokenizer.
    known = [f for f, _ in (*opened, *others) if f is not None and f.facts.tokenizer != UNKNOWN]
    tokenizers = [f.tokenizer or load_tokenizer(f.path / TOKENIZER) for f in known]
    _check_tokenizers([f.path for f in known], tokenizers)
    largest = [entries_of(each) - 1 for each in tokenizers]  # vocabularies in facts are rounded up
    largest += [int(stream.tokens.max()) for f, stream in (*opened, *others) if f not in known]
    named = [
        _end_of_text(Path(path), folder, end_of_text) for path, (folder, _) in zip(data, opened)
    ]
    ends = {end for end in named if end is not None}
    if len(ends) > 1:
        raise ValueError(f"`data` must agree on the token that ends a document, got {sorted(ends)}")
    return TrainingData(
        train=ConcatDataset(train),
        validation=ConcatDataset(tests) if tests else None,
        tokens=sum(map(len, trained)),
        digest=found.hexdigest()[:16],
        contents=_contents(train, tests),
        largest=max(largest),
        end_of_text=next(iter(ends), None),
        tokenizer=next((f.path / TOKENIZER for f, _ in opened if f in known), None),
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


def _end_of_text(path: Path, folder: PreparedFolder | None, given: int | None) -> int | None:
    if folder is not None:
        return folder.facts.end_of_text
    return described_end_of_text(path) if given is None else given


def _check_tokenizers(folders: Sequence[Path], tokenizers: Sequence[Tokenizer]) -> None:
    """Raise ValueError if the folders have different tokenizers."""
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers]
    for folder, tokens in zip(folders, vocabularies):
        if tokens != vocabularies[0]:
            raise ValueError(
                "`data` and `validation` must be made with one tokenizer, those of "
                f"{folders[0]} and {folder} are not the same"
            )


def _open(
    path: Path, end_of_text: int | None, name: str = "train", *, check: bool
) -> tuple[PreparedFolder | None, TokenStream]:
    """The stream in a token file, or that of a prepared folder with the folder."""
    is_file = path.name.endswith(SUFFIX)
    if not (path.is_file() if is_file else path.is_dir()):
        missing = "" if path.exists() else f", which does not exist{near_path(path)}"
        raise ValueError(
            f"`{'data' if name == 'train' else name}` must be folders that `spattention prepare` "
            f"wrote or token files ({SUFFIX}), got {path}{missing}"
        )
    if is_file:
        return None, read_token_file(path, end_of_text)
    folder = PreparedFolder(path)
    return folder, folder.stream(name, check=check)
