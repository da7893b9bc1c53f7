"""Documents of text from files."""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, TextIO

from ..files import reason, shown

SEPARATOR = "\f"
LONGEST_LINE = 2**26  # characters of a JSON line
LONGEST_DOCUMENT = 2**30  # characters between two separators of a text file
CHUNK = 2**20
COMPRESSED = (".gz", ".zst")
ENCODING: dict[str, Any] = {"encoding": "utf-8-sig", "newline": "\n"}


def read_documents(path: Path) -> list[str]:
    """The documents in a text file, a JSONL file, or a folder of both; see `iterate_documents`."""
    return list(iterate_documents(path))


def iterate_documents(path: Path, column: str = "text") -> Iterator[str]:
    """The documents in a text file, a JSONL file, or a folder of both, one after the other.

    A form feed separates documents in a `.txt` file; without one the file is one document. A line
    of a `.jsonl` file is an object whose entry `column` is one document. Either may be compressed,
    with `.gz` or `.zst` after its name. A folder gives the documents of its files in the order of
    their names. Files are read document by document.

    Raises:
        ValueError: if there is no such file, it is of another kind, not UTF-8, or holds no text; a
            bad line is named. A JSON line may have 2**26 characters, a document of a `.txt` file
            2**30.
    """
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if text_kind(f))
        if not files:
            raise ValueError(f"{path} must hold .txt or .jsonl files (or .gz, .zst), got none")
        for entry in files:
            yield from iterate_documents(entry, column)
        return
    if not path.is_file():
        raise ValueError(f"{path} is neither a file nor a folder")
    if path.name.endswith(".u16.xz"):
        raise ValueError(f"{path} holds tokens already, which need no preparing: name it as data")
    kind = text_kind(path)
    if kind is None:
        raise ValueError(
            f"{path} must be text (.txt), JSON lines (.jsonl), one of these compressed (.gz, .zst) "
            "or a token file (.u16.xz)"
        )
    found = False
    try:
        with _open(path) as file:
            parts = _separated(path, file) if kind == ".txt" else _json_lines(path, file, column)
            for part in parts:
                if part.strip():
                    found = True
                    yield part
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error}") from error
    except _Damaged as error:
        raise ValueError(f"{path} must be a whole {path.suffix} file: {error}") from error
    if not found:
        raise ValueError(f"{path} must hold text, got none")


def text_kind(path: Path) -> str | None:
    """`.txt` or `.jsonl`, by the name of a file that may be compressed; None for another."""
    name = path.with_suffix("") if path.suffix in COMPRESSED else path
    return name.suffix if name.suffix in (".txt", ".jsonl") else None


class _Damaged(Exception):
    """A compressed file that ends early or is none."""


@contextmanager
def _open(path: Path) -> Iterator[TextIO]:
    if path.suffix not in COMPRESSED:
        with path.open(**ENCODING) as file:
            yield file
        return
    opening: Any
    damage: tuple[type[Exception], ...]
    if path.suffix == ".gz":
        opening, damage = gzip.open, (gzip.BadGzipFile, EOFError, zlib.error)
    else:
        import zstandard

        opening, damage = zstandard.open, (zstandard.ZstdError, EOFError)
    try:
        with opening(path, "rt", **ENCODING) as file:
            yield file
    except damage as error:
        raise _Damaged(error) from error


def sample_path() -> Path:
    """The folder of public-domain books that the package ships; a document is a chapter."""
    return Path(str(resources.files("spattention.data") / "sample"))


def _separated(path: Path, file: TextIO) -> Iterator[str]:
    held: list[str] = []
    length = 0
    while chunk := file.read(CHUNK):
        first, *rest = chunk.split(SEPARATOR)
        held.append(first)
        length += len(first)
        if length > LONGEST_DOCUMENT:
            raise ValueError(
                f"{path} must have a form feed at least every {LONGEST_DOCUMENT} characters, where "
                f"a document ends; got {length} without one"
            )
        if rest:
            yield "".join(held)
            yield from rest[:-1]
            held, length = [rest[-1]], len(rest[-1])
    yield "".join(held)


def _json_lines(path: Path, file: TextIO, column: str) -> Iterator[str]:
    for number in itertools.count(1):
        line = file.readline(LONGEST_LINE + 1)
        if not line:
            return
        if len(line) > LONGEST_LINE:
            raise ValueError(
                f"{path}, line {number}, must have at most {LONGEST_LINE} characters, got more"
            )
        if not line.strip():
            continue
        rule = f'{path}, line {number}, must be an object with a "{column}" entry'
        try:
            entries = json.loads(line)
        except json.JSONDecodeError as error:  # its own message counts lines of this line
            raise ValueError(f"{rule}: {error.msg} at character {error.pos + 1}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{rule}: {reason(error)}") from error
        if not isinstance(entries, dict):
            raise ValueError(f"{rule}, got {type(entries).__name__}")
        if column not in entries:
            there = f"one with {shown(sorted(entries))}" if entries else "an empty one"
            raise ValueError(f"{rule} (`prepare` takes another with `--column`), got {there}")
        text = entries[column]
        if not isinstance(text, str):
            raise ValueError(
                f"{path}, line {number}: `{column}` must be a string, got {type(text).__name__}"
            )
        check_text(text, f"{path}, line {number}")
        yield text


def check_text(text: str, where: str) -> None:
    """Raise ValueError for half a surrogate pair, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} must hold Unicode text: {error}") from error
