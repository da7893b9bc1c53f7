"""Text as arrays of tokens: what is trained on, held out, and planted with needles.

A folder holds `train_*.u16`, `val_*.u16` and `val_long.u16`, little-endian uint16, made with the
model's own tokenizer; each may be compressed, `.u16.xz`.
"""

from __future__ import annotations

import hashlib
import lzma
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Text:
    """Windows of text.

    Attributes:
        train: int64 `[W, context]`, sources mixed in a fixed order.
        held_out: by source, int64 `[W, context]`.
        long: int64 `[W, longest]`, held out, for needles.
    """

    train: Tensor
    held_out: dict[str, Tensor]
    long: Tensor


def read_text(folder: Path, context: int, longest: int, windows: int) -> Text:
    """The text of a folder; `windows` of each held-out source, spread over it."""
    train = [_windows(_read(file), context) for file in _files(folder, "train_*")]
    held_out = {
        file.name.split(".")[0].removeprefix("val_"): _spread(
            _windows(_read(file), context), windows
        )
        for file in _files(folder, "val_*")
        if not file.name.startswith("val_long")
    }
    (long,) = _files(folder, "val_long*")
    return Text(torch.cat(train), held_out, _windows(_read(long), longest))


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the tokens of each file, its first 16 digits: what tells one text from another."""
    files = [file for kind in ("train_*", "val_*") for file in _files(folder, kind)]
    return {
        file.name.split(".")[0]: hashlib.sha256(_read(file).tobytes()).hexdigest()[:16]
        for file in files
    }


def order(count: int, needed: int, seed: int) -> Tensor:
    """Windows of a run: a permutation by the seed, anew for each time through the text."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-needed // count)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[:needed]


def _files(folder: Path, name: str) -> list[Path]:
    found = sorted(each for each in folder.glob(f"{name}.u16*") if each.is_file())
    if not found:
        raise SystemExit(f"`--text` must hold {name}.u16 or {name}.u16.xz, {folder} has none")
    return found


def _read(file: Path) -> np.ndarray:
    data = file.read_bytes()
    return np.frombuffer(lzma.decompress(data) if file.suffix == ".xz" else data, "<u2")


def _windows(tokens: np.ndarray, length: int) -> Tensor:
    count = len(tokens) // length
    if not count:
        raise SystemExit(f"`--text` must hold at least {length} tokens a file, got {len(tokens)}")
    return torch.from_numpy(tokens[: count * length].astype(np.int64)).view(count, length)


def _spread(windows: Tensor, count: int) -> Tensor:
    if count >= len(windows):
        return windows
    return windows[[k * len(windows) // count for k in range(count)]]
