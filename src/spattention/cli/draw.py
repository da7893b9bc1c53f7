"""`spattention draw`: which distances each head attends, as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..choice import named_pattern
from ..plots import pattern_figure

SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Options:
    """Draw an attention pattern: the mask of every head, and which head covers which distance.

    In a mask a row is a query and a column a key; what a head attends has the head's colour, the
    rest of the past is grey, and the future is white.

    Args:
        pattern: dense, shared_local, exclusive, sliding_window, gapped or local_only; options
            follow a colon, as in shared_local:widths=geometric,local=64.
        heads: Number of heads.
        span: Context length that the pattern is made for, in tokens.
        length: Tokens that the masks show; default the span.
        output: Where the picture goes; .png, .svg or .pdf.
        dots_per_inch: Resolution of a .png.
    """

    pattern: Annotated[str, tyro.conf.Positional] = "shared_local"
    heads: int = 8
    span: int = 1024
    length: int | None = None
    output: Path = Path("pattern.png")
    dots_per_inch: int = 200


def main(options: Options) -> None:
    """Draw and write."""
    if options.output.suffix not in SUFFIXES:
        raise ValueError(f"`--output` must end with one of {SUFFIXES}, got {options.output.name}")
    if options.dots_per_inch < 1:
        raise ValueError(f"`--dots-per-inch` must be at least 1, got {options.dots_per_inch}")
    pattern = named_pattern(options.pattern, options.heads, options.span)
    title = f"{options.pattern}, {options.heads} heads, span {options.span}"
    figure = pattern_figure(pattern, options.length, title)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=options.dots_per_inch)
    print(f"wrote {options.output}")
