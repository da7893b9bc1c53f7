"""Options of `spattention bench decode`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Options:
    """Time decoding: a query for every row of a batch, against keys and values of a long text.

    Bands are timed over a cache that keeps every token, and over a BandStore, which keeps what the
    bands reach. Both are first checked against float64 at the size that is timed. Times are medians
    of graph replays (the GPU's own time) and of eager calls. Compulsory bytes are the keys and
    values that some query sees; their speed is also given as a share of a copy's.

    Args:
        lengths: tokens of the text.
        batches: rows of the batch.
        heads: query heads.
        key_heads: key/value heads; as many as query heads if not given.
        queries: tokens per row, 1 to 16.
        head_dim: D.
        dtype: of query, key and value.
        flex: also time compiled FlexAttention over all keys.
        seed: Of the random inputs.
        commit: The commit to record, where git cannot tell.
        output: Folder for the results: JSON, a table and a plot. Nothing is written without it.
    """

    lengths: tuple[int, ...] = (4096, 16384, 65536)
    batches: tuple[int, ...] = (1, 8, 32)
    heads: int = 16
    key_heads: int | None = None
    queries: int = 1
    head_dim: int = 128
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    flex: bool = True
    seed: int = 0
    commit: str | None = None
    output: Path | None = None
