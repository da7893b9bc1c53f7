"""Files of packed tokens: uint16, compressed with xz, and described by a JSON beside them."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np

from .tokens import TokenStream

SUFFIX = ".u16.xz"
MAGIC = b"\xfd7zXZ\x00"


def read_packed(path: Path, end_of_text: int | None = None) -> TokenStream:
    """The stream in `NAME.u16.xz`, checked against `NAME.json`.

    Args:
        path: the compressed stream. The JSON beside it gives `docs` and `tokens`, and optionally
            `bytes` (size of the file), `eos` (how many separators the stream holds), `max` (the
            largest token) and `end_of_text`.
        end_of_text: the token between documents; default the JSON's. Without one, documents of
            equal length are read as such, and any other stream counts as one document.

    Raises:
        ValueError: if a file is missing, truncated, not of this form, or does not agree with its
            description.
    """
    described = _beside(path)
    facts = _description(described)
    tokens = _tokens(path, facts)
    for name, found in (("tokens", len(tokens)), ("max", int(tokens.max(initial=0)))):
        if name in facts and facts[name] != found:
            raise ValueError(
                f"{path} does not agree with {described.name}: `{name}` must be {facts[name]}, got "
                f"{found}"
            )
    if end_of_text is None:
        end_of_text = facts.get("end_of_text")
    return TokenStream(tokens, _starts(path, tokens, facts, end_of_text))


def described_end_of_text(path: Path) -> int | None:
    """The token between documents that the JSON beside a packed stream names, if it names one."""
    return _description(_beside(path)).get("end_of_text")


def write_packed(path: Path, stream: TokenStream, end_of_text: int) -> None:
    """Write a stream whose documents end with `end_of_text`, for `read_packed`."""
    if not path.name.endswith(SUFFIX):
        raise ValueError(f"`path` must end with {SUFFIX}, got {path.name}")
    if len(stream) and int(stream.tokens.max()) > np.iinfo(np.uint16).max:
        raise ValueError(f"`stream` must hold tokens below 65536, got {int(stream.tokens.max())}")
    path.write_bytes(lzma.compress(stream.tokens.astype("<u2").tobytes()))
    facts = {
        "file": path.name,
        "docs": stream.num_documents,
        "tokens": len(stream),
        "bytes": path.stat().st_size,
        "eos": int((stream.tokens == end_of_text).sum()),
        "max": int(stream.tokens.max(initial=0)),
        "end_of_text": end_of_text,
    }
    _beside(path).write_text(json.dumps(facts) + "\n")


def _beside(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(SUFFIX) + ".json")


def _description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"packed tokens need their description beside them, {path} is missing")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON: {error}") from error
    if not isinstance(facts, dict) or not all(
        isinstance(facts.get(k), int) for k in ("docs", "tokens")
    ):
        raise ValueError(f"{path} must give the integers `docs` and `tokens`")
    if facts["docs"] < 1:
        raise ValueError(f"{path}: `docs` must be at least 1, got {facts['docs']}")
    return facts


def _tokens(path: Path, facts: dict[str, Any]) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    packed = path.read_bytes()
    if not packed.startswith(MAGIC):
        raise ValueError(f"{path} must be compressed with xz, got a file of another kind")
    if "bytes" in facts and facts["bytes"] != len(packed):
        raise ValueError(
            f"{path} is truncated or not the file described: it must have {facts['bytes']} bytes, "
            f"got {len(packed)}"
        )
    try:
        raw = lzma.decompress(packed)
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from error
    if len(raw) % 2:
        raise ValueError(f"{path} must hold uint16 tokens, got an odd number of bytes ({len(raw)})")
    return np.frombuffer(raw, "<u2").astype(np.uint16, copy=False)


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
