"""The marks among a folder's weights, which say with which bands they were saved."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import Tensor

from ..hf.apply import band_note
from ..hf.config import Section
from ..hf.weights import is_mark, refuse_mark_of_other

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def without_marks(
    weights: Iterable[tuple[str, Tensor]], section: Section
) -> Iterator[tuple[str, Tensor]]:
    """A folder's weights without their marks, which no engine knows.

    Raises:
        ValueError: for a layer whose weights were saved with other bands than the config's.
    """
    for name, weight in weights:
        if not is_mark(name):
            yield name, weight
            continue
        layer = LAYER.search(name)
        assert layer is not None, name
        pattern = section.layer_patterns[int(layer[1])]
        refuse_mark_of_other(None if pattern is None else band_note(pattern), name, weight)
