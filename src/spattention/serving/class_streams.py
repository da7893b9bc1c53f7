"""Streams on which the classes of heads of one layer decode side by side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class ClassStreams:
    """One stream per class of heads but the last, which stays on the current stream.

    The classes of a layer read different keys and write different outputs. Alone, each of their
    launches ends in a wave that fills only part of the GPU; side by side they fill it for one
    another. A CUDA graph captures them as parallel branches.

    Args:
        classes: classes of heads of a layer.
        device: without streams, such as the CPU's, the classes run one after the other.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        count = classes - 1 if device.type == "cuda" else 0
        self.sides = [torch.cuda.Stream(device) for _ in range(count)]
        self.copies: list[torch.Tensor] = []

    @contextmanager
    def run(self, index: int, query: torch.Tensor) -> Iterator[torch.Tensor]:
        """Launches of class `index` in this context run on its stream.

        The classes of a layer come in order. After the last one the current stream waits for all:
        outputs may be read from then on.

        Args:
            index: 0 to `classes - 1`.
            query: what the current stream may overwrite next.

        Yields:
            the query to read: a copy, where the current stream does not wait.
        """
        if index < len(self.sides):
            side = self.sides[index]
            self.copies.append(query.clone())
            side.wait_stream(torch.cuda.current_stream(side.device))
            with torch.cuda.stream(side):
                yield self.copies[-1]
        else:
            yield query
            for side in self.sides:
                torch.cuda.current_stream(side.device).wait_stream(side)
            self.copies.clear()
