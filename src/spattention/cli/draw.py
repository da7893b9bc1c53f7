"""`spattention draw`: a picture of the distances that each head attends."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from matplotlib.figure import Figure

from ..bands import BandPattern
from ..choice import is_other, named_pattern, other_attention, pattern_remarks
from ..files import write_atomically
from ..plots import pattern_figure, picture_of, seen_figure
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
    write_atomically(options.output, picture_of(figure, options.dots_per_inch, suffix[1:]))
    print(f"wrote {options.output}{share}")


def _figure(options: Options) -> tuple[Figure, str]:
    """The picture, and of a pattern its share of dense attention's pairs."""
    # Edges and intervals have slashes too, behind the colon. `Path` cannot ask for a long name.
    if os.path.isdir(options.pattern) or "/" in options.pattern.partition(":")[0]:
        return _saved_figure(options)
    if options.layer is not None:
        raise ValueError(
            f"`--layer` must be of a saved model with bands, {options.pattern} is no folder"
        )
    title = f"{options.pattern}, {options.heads} heads, span {options.span}"
    if not is_other(options.pattern):
        pattern = named_pattern(options.pattern, options.heads, options.span)
        for remark in pattern_remarks(pattern):
            print(f"warning: {remark}", file=sys.stderr)
        return _pattern_figure(pattern, options.length, title)
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


def _saved_figure(options: Options) -> tuple[Figure, str]:
    """Draw a layer of a saved model."""
    from ..hf.config import read_section
    from ..loading import model_folder, open_config

    folder = model_folder(Path(options.pattern))
    section = read_section(open_config(folder).get_text_config())
    if section is None:
        raise ValueError(f"{folder} must hold a model with bands, it has none")
    banded = [index for index, entry in enumerate(section.layer_patterns) if entry is not None]
    layer = banded[0] if options.layer is None else options.layer
    if layer not in banded:
        raise ValueError(f"`--layer` must be a layer of {folder} with bands, {banded}, got {layer}")
    pattern = section.layer_patterns[layer]
    assert pattern is not None
    if pattern.num_heads > MOST_HEADS:
        raise ValueError(f"{folder} must have at most {MOST_HEADS} heads, got {pattern.num_heads}")
    title = f"{folder}, layer {layer}, {pattern.num_heads} heads, span {pattern.span}"
    return _pattern_figure(pattern, options.length, title)


def _pattern_figure(pattern: BandPattern, length: int | None, title: str) -> tuple[Figure, str]:
    length = pattern.span if length is None else length
    dense = pattern.num_heads * length * (length + 1) // 2
    share = f": {100 * sum(pattern.pairs(length)) / dense:.1f} % of dense attention's pairs"
    return pattern_figure(pattern, length, title), share
