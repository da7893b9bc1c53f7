"""A recorder of passes that needs no GPU, in place of `spattention.training.graphs.Recorder`."""

from __future__ import annotations

from collections.abc import Callable

import torch

Pass = Callable[[], torch.Tensor]


class Recorder:
    """A recorder of the CPU: what it records runs at each replay, and never before."""

    def __init__(self, waits: str | None = None) -> None:
        self.waits = waits
        self.replays = 0
        self.records = 0

    def run(self, function: Pass) -> torch.Tensor:
        return function()

    def run_watched(self, function: Pass) -> tuple[torch.Tensor, str | None]:
        return function(), self.waits

    def record(self, function: Pass) -> tuple[Callable[[], None], torch.Tensor]:
        self.records += 1
        loss = torch.full((), torch.nan)

        def replay() -> None:
            self.replays += 1
            loss.copy_(function())

        return replay, loss
