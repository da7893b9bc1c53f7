"""Token files: uint16, compressed with xz, and described by a JSON beside them."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np

from ..files import read_json, shown, write_atomically
from .tokens import TokenStream

SUFFIX = ".u16.xz"
MAGIC = b"\xfd7zXZ\x00"
OPTIONAL = ("bytes", "eos", "max", "end_of_text")  # integers of a description
CHUNK = 2**20  # bytes that are read at a time
MEMORY = 2**30  # bytes that the decompressor may take; xz -9 needs 2**26
# A stream is unpacked into memory, so a file may not claim any size. Text compresses 2 to 4 times.
ALWAYS, RATIO = 2**26, 50  # tokens that any file may hold, and tokens per byte of a larger one


def read_token_file(path: Path, end_of_text: int | None = None) -> TokenStream:
    """The stream in `NAME.u16.xz`, checked against `NAME.json`.

    Args:
        path: the compressed stream. The JSON beside it gives `docs` and `tokens`, and optionally
            `bytes` (size of the file), `eos` (how many separators the stream holds), `max` (the
            largest token) and `end_of_text`.
        end_of_text: the token between documents; default the JSON's. Without one, documents of
            equal length are read as such, and any other stream counts as one document.

    Raises:
        ValueError: if a file is missing, truncated, not of this form, or does not agree with its
            description. A file that unpacks to more than described is read no further than that.
    """
    described = _beside(path)
    facts = _description(described)
    tokens = _tokens(path, facts)
    largest = int(tokens.max())
    if facts.get("max", largest) != largest:
        raise ValueError(
            f"{path} does not agree with {described.name}: `max` must be {facts['max']}, got "
            f"{largest}"
        )
    if end_of_text is None:
        end_of_text = facts.get("end_of_text")
    return TokenStream(tokens, _starts(path, tokens, facts, end_of_text))


def described_end_of_text(path: Path) -> int | None:
    """The token between documents that the JSON beside a token file names, if it names one."""
    return _description(_beside(path)).get("end_of_text")


def write_token_file(path: Path, stream: TokenStream, end_of_text: int) -> None:
    """Write a stream whose documents end with `end_of_text`, for `read_token_file`."""
    if not path.name.endswith(SUFFIX):
        raise ValueError(f"`path` must end with {SUFFIX}, got {path.name}")
    if len(stream) and int(stream.tokens.max()) > np.iinfo(np.uint16).max:
        raise ValueError(f"`stream` must hold tokens below 65536, got {int(stream.tokens.max())}")
    write_atomically(path, lzma.compress(stream.tokens.astype("<u2").tobytes()))
    facts = {
        "file": path.name,
        "docs": stream.num_documents,
        "tokens": len(stream),
        "bytes": path.stat().st_size,
        "eos": int((stream.tokens == end_of_text).sum()),
        "max": int(stream.tokens.max(initial=0)),
        "end_of_text": end_of_text,
    }
    write_atomically(_beside(path), json.dumps(facts) + "\n")


def _beside(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(SUFFIX) + ".json")


def _description(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"a token file needs its description beside it, {path} is missing")
    facts = {name: value for name, value in read_json(path).items() if value is not None}
    if not all(type(facts.get(name)) is int for name in ("docs", "tokens")):
        raise ValueError(f"{path} must give the integers `docs` and `tokens`")
    highest = {"max": 2**16 - 1, "end_of_text": 2**16 - 1}
    for name, lowest in (("tokens", 1), ("docs", 1), *((n, 0) for n in OPTIONAL)):
        value, most = facts.get(name, lowest), highest.get(name, 2**48)
        if type(value) is not int or not lowest <= value <= most:
            raise ValueError(
                f"{path}: `{name}` must be an integer from {lowest} to {most}, got {shown(value)}"
            )
    return facts


def _tokens(path: Path, facts: dict[str, Any]) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path} must be compressed with xz, got a file of another kind")
    size, count = path.stat().st_size, facts["tokens"]
    if "bytes" in facts and facts["bytes"] != size:
        raise ValueError(
            f"{path} is truncated or not the file described: it must have {facts['bytes']} bytes, "
            f"got {size}"
        )
    if count > max(ALWAYS, RATIO * size):
        raise ValueError(
            f"{path}: `tokens` must be at most {max(ALWAYS, RATIO * size)} for a file of {size} "
            f"bytes, got {count}"
        )
    raw = bytearray(2 * count)
    found = _unpack(path, memoryview(raw))
    if found > len(raw):
        raise ValueError(
            f"{path} does not agree with {_beside(path).name}: `tokens` must be {count}, got more"
        )
    if found % 2:
        raise ValueError(f"{path} must hold uint16 tokens, got an odd number of bytes ({found})")
    if found < len(raw):
        raise ValueError(
            f"{path} does not agree with {_beside(path).name}: `tokens` must be {count}, got "
            f"{found // 2}"
        )
    return np.frombuffer(raw, "<u2").astype(np.uint16, copy=False)


def _unpack(path: Path, into: memoryview) -> int:
    """Decompress until the file or the buffer ends; returns the bytes found, one more at most."""
    decompressor, found = _decompressor(), 0
    try:
        with path.open("rb") as file:
            packed = file.read(CHUNK)
            while found <= len(into):
                if decompressor.eof:  # several streams may follow each other
                    packed = decompressor.unused_data.lstrip(b"\0") or file.read(CHUNK).lstrip(
                        b"\0"
                    )
                    if not packed:
                        return found
                    decompressor = _decompressor()
                elif decompressor.needs_input and not packed:
                    packed = file.read(CHUNK)
                    if not packed:
                        raise EOFError("the end of the compressed stream is missing")
                part = decompressor.decompress(packed, min(CHUNK, len(into) - found + 1))
                packed = b""
                into[found : found + len(part)] = part[: len(into) - found]
                found += len(part)
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from error
    return found


def _decompressor() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MEMORY)


def _starts(
    path: Path, tokens: np.ndarray, facts: dict[str, Any], end_of_text: int | None
) -> np.ndarray:
    if end_of_text is not None:
        ends = np.flatnonzero(tokens == end_of_text) + 1
        if facts.get("eos", len(ends)) != len(ends):
            raise ValueError(
                f"{path} must hold {facts['eos']} tokens {end_of_text} (end of text), got "
                f"{len(ends)}"
            )
        if len(ends):
            return np.unique([0, *ends, len(tokens)]).astype(np.int64)
    if facts.get("eos") == 0 and len(tokens) % facts["docs"] == 0:
        return np.linspace(0, len(tokens), facts["docs"] + 1).astype(np.int64)
    return np.array([0, len(tokens)], dtype=np.int64)
