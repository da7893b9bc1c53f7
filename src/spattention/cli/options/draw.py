"""Options of `spattention draw`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Options:
    """Draw an attention pattern: the mask of every head, and which head covers which distance.

    In a mask a row is a query and a column a key. Attended pairs have the head's colour, the rest
    of the past is grey, and the future is white. Pairs attended as part of a group are paler.

    Args:
        pattern: dense, shared_local, exclusive, sliding_window, gapped, local_only, or intervals
            with those of every head, as in intervals:heads=0-64+256-512; options follow a colon,
            as in shared_local:widths=geometric,local=64,prefix=4. Baselines and related systems
            are drawn pair by pair, as in cca:group=16; where they depend on the data, on random
            queries and keys. Or the folder of a saved model with bands.
        heads: Number of heads, at most 128. A saved model has its own.
        span: Context length that the pattern is made for, in tokens. A saved model has its own.
        layer: Layer of a saved model; default its first with bands.
        length: Tokens that the masks show; default the span.
        output: File of the picture; .png, .svg or .pdf.
        dots_per_inch: Resolution of a .png.
    """

    pattern: Annotated[str, tyro.conf.Positional] = "shared_local"
    heads: int = 8
    span: int = 1024
    layer: int | None = None
    length: int | None = None
    output: Path = Path("pattern.png")
    dots_per_inch: int = 200
