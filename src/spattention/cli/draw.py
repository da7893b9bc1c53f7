"""`spattention draw`: a picture of the distances that each head attends."""

from __future__ import annotations

import io
import sys

from matplotlib.figure import Figure

from ..choice import is_other, named_pattern, other_attention, pattern_remarks
from ..files import write_atomically
from ..plots import pattern_figure, seen_figure
from .bounds import LARGEST, check_range
from .options.draw import Options

MOST_HEADS = 128
MOST_PAIRS = 2**28  # of all heads, one byte each
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
    figure, share = _figure(options)
    width, height = (round(side * options.dots_per_inch) for side in figure.get_size_inches())
    if suffix == ".png" and (max(width, height) >= 2**16 or width * height > MOST_PIXELS):
        raise ValueError(
            "`--dots-per-inch` must give less than 65,536 pixels a side and at most "
            f"{MOST_PIXELS:,} in all, got {width:,} x {height:,} with {options.dots_per_inch}"
        )
    picture = io.BytesIO()
    figure.savefig(picture, dpi=options.dots_per_inch, format=suffix[1:])
    write_atomically(options.output, picture.getvalue())
    print(f"wrote {options.output}{share}")


def _figure(options: Options) -> tuple[Figure, str]:
    """The picture, and of a pattern its share of dense attention's pairs."""
    title = f"{options.pattern}, {options.heads} heads, span {options.span}"
    if not is_other(options.pattern):
        pattern = named_pattern(options.pattern, options.heads, options.span)
        for remark in pattern_remarks(pattern):
            print(f"warning: {remark}", file=sys.stderr)
        length = options.span if options.length is None else options.length
        dense = options.heads * length * (length + 1) // 2
        share = f": {100 * sum(pattern.pairs(length)) / dense:.1f} % of dense attention's pairs"
        return pattern_figure(pattern, length, title), share
    from ..baselines import seen

    other = other_attention(options.pattern, options.heads, options.span)
    length = options.span if options.length is None else options.length
    if length > options.span:
        raise ValueError(
            f"`--length` must be at most `--span` = {options.span} for {options.pattern}, got "
            f"{length}"
        )
    if (pairs := options.heads * length**2) > MOST_PAIRS:
        raise ValueError(
            f"`--heads` and `--length` must make at most {MOST_PAIRS:,} pairs for "
            f"{options.pattern}, which draws each of them, got {pairs:,}"
        )
    return seen_figure(seen(other, length).numpy(), title), ""
