"""A corpus of any size as tokens: tokenized on all cores, and written as it goes.

The folder is what `prepare.open_stream` and `prepare.open_facts` read: for training and validation
each a `.tokens.npy` that can be mapped into memory and the starts of its documents, the tokenizer,
and the facts.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ..files import counted, make_folder, naming, near_path, reason, remove_empty, sync
from .arrays import save_array
from .prepare import TRAINED, CorpusFacts, split_documents, write_facts
from .text import check_text, iterate_documents, text_kind
from .tokenizer import (
    END_OF_TEXT,
    DocumentEncoder,
    check_vocabulary,
    end_of_text_id,
    entries_of,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

BATCH = 512  # documents that are tokenized together, on all cores
DATASET_MARKS = ("dataset_info.json", "dataset_dict.json", "state.json")
SAMPLE = 20_000  # first documents, on which a tokenizer is trained
HALF = Fraction(1, 2)
HEADER = 128  # bytes before the tokens of a .npy file


@dataclass(frozen=True)
class Source:
    """Documents of text, with a name for messages; their number, if it is known; and what ends a
    document, to be said where there are too few."""

    name: str
    documents: Iterable[str]
    total: int | None = None
    separator: str | None = None


def open_source(
    what: str,
    *,
    name: str | None = None,
    split: str = "train",
    column: str = "text",
    streaming: bool = False,
) -> Source:
    """Open text from files or from a Hugging Face dataset.

    Args:
        what: a `.txt` or `.jsonl` file or a folder of these (see `iterate_documents`), `.parquet`
            files, a folder that `datasets` saved, or else the name of a dataset on the hub.
        name: the dataset's configuration, where it has several.
        split: split of the dataset.
        column: entry of JSON lines, or column of the dataset, that holds the text.
        streaming: read the dataset as it arrives, without a copy on disk.

    Raises:
        ValueError: if there is neither such a file nor such a dataset, or it has no such column.
    """
    path = Path(what)
    marked = any((path / mark).exists() for mark in DATASET_MARKS)
    if (path.is_file() and path.suffix != ".parquet") or (path.is_dir() and not marked):
        if name is not None or split != "train" or streaming:
            raise ValueError(
                f"`--name`, `--split` and `--streaming` are for datasets, {what} holds text; got "
                f"{name}, {split}, {streaming}"
            )
        plain = text_kind(path) == ".txt" or any(text_kind(f) == ".txt" for f in path.glob("*"))
        separator = "a form feed ends a document in a .txt file" if plain else None
        return Source(what, iterate_documents(path, column), separator=separator)
    other = (path.exists() or path.is_symlink()) and not (path.is_file() or path.is_dir())
    if other or (path.is_absolute() and not path.exists()):
        raise ValueError(f"{path} is neither a file nor a folder")
    import datasets

    try:
        if path.is_dir():
            found = datasets.load_from_disk(what)
            found = found[split] if isinstance(found, datasets.DatasetDict) else found
        elif path.is_file():
            found = datasets.load_dataset("parquet", data_files=what, split="train")
        else:
            found = datasets.load_dataset(what, name, split=split, streaming=streaming)
    except Exception as error:  # `datasets` and Arrow raise many types for a damaged file
        near = "" if path.exists() else near_path(path)
        raise ValueError(
            f"{what} is neither a file nor a dataset that can be read: {error}{near}"
        ) from error
    if found.column_names is not None and column not in found.column_names:
        raise ValueError(f"`--column` must be one of {found.column_names}, got {column!r}")
    total = None if isinstance(found, datasets.IterableDataset) else len(found)
    return Source(what, _texts(what, column, found), total)


def _texts(what: str, column: str, rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The documents of a dataset, those without text as empty ones."""
    entries = iter(rows)
    for number in itertools.count():
        try:
            text = next(entries)[column]
        except StopIteration:
            return
        except Exception as error:  # as in `open_source`
            raise ValueError(f"{what}, row {number}, cannot be read: {reason(error)}") from error
        if not isinstance(text, str | None):
            raise ValueError(
                f"{what}, row {number}: `{column}` must be a string, got {type(text).__name__}"
            )
        check_text(text or "", f"{what}, row {number}")
        yield text or ""


def prepare_corpus(
    folder: Path,
    source: Source,
    *,
    tokenizer: Path | None = None,
    vocabulary: int = 32768,
    end_of_text: str = END_OF_TEXT,
    held_out: float = 0.005,
    on_progress: Callable[[int, int], None] = lambda documents, tokens: None,
) -> CorpusFacts:
    """Tokenize a source into a folder, which appears when it is complete and not before.

    Args:
        folder: where the result goes; it must not exist.
        source: the documents; those without text are dropped.
        tokenizer: a `tokenizer.json`; None trains a byte-level BPE on the first documents.
        vocabulary: entries of the tokenizer that is trained.
        end_of_text: the token that ends each document.
        held_out: share of the documents kept for validation, spread evenly; 0 keeps none. A source
            of one document is cut at a line's end instead.
        on_progress: called with documents and tokens so far, after each batch.

    Raises:
        ValueError: if the folder exists or another process prepares it, the source is empty, or a
            value is out of range.
    """
    if folder.exists():
        raise ValueError(f"`--output` must be a new folder, {folder} exists")
    if not 0 <= held_out <= 0.5:
        raise ValueError(f"`--held-out` must lie between 0 and 0.5, got {held_out}")
    if tokenizer is None:
        check_vocabulary(vocabulary)  # the trainer aborts the process for one that is too large
    staging = folder.with_name(f".{folder.name}.preparing")
    made = make_folder(folder.parent)
    try:
        staging.mkdir()
    except FileExistsError as error:
        raise ValueError(
            f"`--output` must be prepared by one process at a time, got {folder}, and {staging} "
            "exists. Where none is at work, one was killed: remove that folder"
        ) from error
    try:
        used = None if tokenizer is None else load_tokenizer(tokenizer)
        # Both raise before a document is read.
        if used is not None:
            end_of_text_id(used, end_of_text)
        elif end_of_text != END_OF_TEXT:
            raise ValueError(
                f"the tokenizer must have the token {end_of_text}, and one that is trained has "
                f"{END_OF_TEXT} alone"
            )
        documents, held_out = _enough(source, held_out)
        first: list[str] = []
        if used is None:
            first = [text for text in itertools.islice(documents, SAMPLE) if text.strip()]
            used = train_tokenizer(first, vocabulary)
        encoder = DocumentEncoder(used, end_of_text_id(used, end_of_text))
        train, validation = _write(
            staging, itertools.chain(first, documents), encoder, held_out, on_progress
        )
        save_tokenizer(used, staging / "tokenizer.json")
        facts = write_facts(
            staging,
            source=source.name,
            tokenizer=str(tokenizer) if tokenizer else TRAINED,
            entries=entries_of(used),
            end_of_text=encoder.end_of_text,
            streams=[(w.num_documents, w.num_tokens, w.digest) for w in (train, validation)],
        )
        staging.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        remove_empty(made)
    return facts


def _write(
    folder: Path,
    documents: Iterator[str],
    encoder: DocumentEncoder,
    held_out: float,
    on_progress: Callable[[int, int], None],
) -> tuple[StreamWriter, StreamWriter]:
    writers = [StreamWriter(folder, name, encoder.dtype) for name in ("train", "validation")]
    share = Fraction(str(held_out))
    count = 0
    while batch := list(itertools.islice(documents, BATCH)):
        texts = [text for text in batch if text and text.strip()]
        if not texts:
            continue
        stream = encoder.encode(texts)
        for k in range(stream.num_documents):
            # The number of the first n that are held out, in exact arithmetic: any share, evenly.
            before, after = (math.ceil(n * share - HALF) for n in (count + k, count + k + 1))
            writers[before < after].add(stream.tokens[stream.starts[k] : stream.starts[k + 1]])
        count += stream.num_documents
        on_progress(count, sum(writer.num_tokens for writer in writers))
    for writer in writers:
        writer.close()
    train, validation = writers
    if not train.num_tokens:
        raise ValueError("the source must hold text, got none")
    if held_out and not validation.num_tokens:
        raise _too_few(count, held_out)
    return train, validation


def _enough(source: Source, held_out: float) -> tuple[Iterator[str], float]:
    """The documents of a source and the share to hold out, once some of them will be held out.

    A single document becomes two, of which the second, shorter one will be held out.

    Raises:
        ValueError: if there are too few; a source that needs more than a batch is not looked at.
    """
    documents = iter(source.documents)
    needed = math.floor(HALF / Fraction(str(held_out))) + 1 if held_out else 0
    if needed > BATCH:
        return documents, held_out
    first = [text for text in itertools.islice(documents, needed) if text and text.strip()]
    if first and len(first) < needed:
        first += itertools.islice((t for t in documents if t and t.strip()), needed - len(first))
        if len(first) == 1:
            kept, held = split_documents(first, held_out)
            return iter([*kept, *held]), 0.5  # of two, the second
        if len(first) < needed:
            raise _too_few(len(first), held_out, source.separator)
    return itertools.chain(first, documents), held_out


def _too_few(count: int, held_out: float, separator: str | None = None) -> ValueError:
    more = ""
    if count > 1:
        least = float(f"{1.1 / (2 * count):.2g}")  # above the bound when rounded too
        more = f", for none, or more than 1 / {2 * count}, such as {least},"
    said = f"; {separator}" if separator else ""
    return ValueError(
        f"`--held-out` must be 0{more} for a source of {counted(count, 'document')}, got "
        f"{held_out}{said}"
    )


class StreamWriter:
    """Writes one stream, `NAME.tokens.npy` and `NAME.starts.npy`, as `open_stream` reads it,
    document by document. The dtype of its tokens is uint16 or uint32."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.num_tokens = 0
        self.digest = ""
        self._starts = [0]
        self._path = folder / f"{name}.tokens.npy"
        self._starts_path = folder / f"{name}.starts.npy"
        self._file = self._path.open("wb")
        self._file.write(b"\0" * HEADER)  # the number of tokens is known at the end
        self._found = hashlib.sha256()

    @property
    def num_documents(self) -> int:
        return len(self._starts) - 1

    def add(self, tokens: np.ndarray) -> None:
        """Append one document of at least one token."""
        with naming(self._path):
            self._file.write(tokens.astype(self.dtype).tobytes())
        self._found.update(tokens.astype("<u4").tobytes())
        self.num_tokens += len(tokens)
        self._starts.append(self.num_tokens)

    def close(self) -> None:
        """Complete the files and set `digest`, which equals `TokenStream.digest`."""
        description = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.num_tokens,),
        }
        with naming(self._path), self._file:
            self._file.seek(0)
            np.lib.format.write_array_header_1_0(self._file, description)
            assert self._file.tell() == HEADER
        starts = np.array(self._starts, np.int64)
        self._found.update(starts.astype("<i8").tobytes())
        self.digest = self._found.hexdigest()
        save_array(self._starts_path, starts)
