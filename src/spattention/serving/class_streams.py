"""Streams on which the classes of heads of one layer decode side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

    def run(self, classes: Sequence[Callable[[], None]]) -> None:
        """Launch the classes of a layer. Afterwards the current stream waits for all.

        Args:
            classes: each launches its class on the current stream.
        """
        for side, launch in zip(self.sides, classes):
            side.wait_stream(torch.cuda.current_stream(side.device))
            with torch.cuda.stream(side):
                launch()
        for launch in classes[len(self.sides) :]:
            launch()
        for side in self.sides:
            torch.cuda.current_stream(side.device).wait_stream(side)
