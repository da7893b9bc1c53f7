"""Counters of the programs of a launch that have arrived, 0 between launches.

The program that arrives last sets its counter back. A counter belongs to one launch at a time:
launches of a stream run one after the other and share counters, and so do the replays of a CUDA
graph. Each launch that a graph captures therefore has counters of its own, for good.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton

from ..constants import is_capturing

SMALLEST = 1 << 14  # counters, 64 KiB
CAPTURES = 128  # captured launches as large as this one for which counters are made ahead


class ArrivalCounters:
    """Zeros on each device, for one launch at a time."""

    def __init__(self) -> None:
        self.of_stream: dict[Any, torch.Tensor] = {}
        self.ahead: dict[torch.device, torch.Tensor] = {}
        self.retained: list[torch.Tensor] = []

    def get(self, device: torch.device, count: int) -> torch.Tensor:
        """int32 `[count]` or more on the device, all 0, for a launch on its current stream.

        A captured launch gets zeros that were made before the capture. Where these are used up, the
        graph fills them itself, in one more node.
        """
        count = -(-count // 4) * 4  # slices stay aligned for Triton
        spare = self.ahead.get(device)
        left = 0 if spare is None else len(spare)
        if is_capturing(device):
            if spare is None or left < count:
                return torch.zeros(count, dtype=torch.int32, device=device)
            self.ahead[device] = spare[count:]
            return spare[:count]
        if device.type == "cuda" and left < CAPTURES * count:
            self.ahead[device] = self._zeros(max(SMALLEST, 2 * CAPTURES * count), device)
        stream = device, current_stream(device)
        found = self.of_stream.get(stream)
        if found is None or len(found) < count:
            found = self._zeros(max(SMALLEST, 2 * count), device)
            self.of_stream[stream] = found
        return found

    def _zeros(self, count: int, device: torch.device) -> torch.Tensor:
        """Zeros that are never given back: launches of any stream may be using them.

        They are made by a separate thread for the reason that `constants.int32_table` gives.
        """
        with ThreadPoolExecutor(max_workers=1) as thread:
            made = thread.submit(lambda: torch.zeros(count, dtype=torch.int32).to(device)).result()
        self.retained.append(made)
        return made


def current_stream(device: torch.device) -> int:
    """Address of the current stream of a GPU; 0 on the CPU."""
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.get_current_stream(index))


arrival_counters = ArrivalCounters()
