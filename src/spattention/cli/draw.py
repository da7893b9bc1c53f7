"""`spattention draw`: a picture of the distances that each head attends."""

from __future__ import annotations

import io
import sys

from ..choice import named_pattern, pattern_remarks
from ..files import write_atomically
from ..plots import pattern_figure
from .bounds import LARGEST, check_range
from .options.draw import Options

MOST_HEADS = 128
MOST_PIXELS = 2**28  # of a .png, 1 GiB in memory
SUFFIXES = (".png", ".svg", ".pdf")


def main(options: Options) -> None:
    """Draw and write."""
    suffix = options.output.suffix
    if suffix not in SUFFIXES:
        raise ValueError(f"`--output` must end with one of {SUFFIXES}, got {options.output.name}")
    if options.output.is_dir():
        raise ValueError(f"`--output` must be a file, {options.output} is a folder")
    check_range(
        options,
        heads=(1, MOST_HEADS),
        span=(1, LARGEST),
        length=(1, LARGEST),
        dots_per_inch=(1, LARGEST),
    )
    pattern = named_pattern(options.pattern, options.heads, options.span)
    for remark in pattern_remarks(pattern):
        print(f"warning: {remark}", file=sys.stderr)
    title = f"{options.pattern}, {options.heads} heads, span {options.span}"
    figure = pattern_figure(pattern, options.length, title)
    width, height = (round(side * options.dots_per_inch) for side in figure.get_size_inches())
    if suffix == ".png" and (max(width, height) >= 2**16 or width * height > MOST_PIXELS):
        raise ValueError(
            "`--dots-per-inch` must give less than 65,536 pixels a side and at most "
            f"{MOST_PIXELS:,} in all, got {width:,} x {height:,} with {options.dots_per_inch}"
        )
    picture = io.BytesIO()
    figure.savefig(picture, dpi=options.dots_per_inch, format=suffix[1:])
    write_atomically(options.output, picture.getvalue())
    print(f"wrote {options.output}")
