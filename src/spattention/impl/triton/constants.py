"""Tables of integers on the device that depend on nothing but a pattern and a shape."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch

Value = TypeVar("Value")


class ConstantCache(Generic[Value]):
    """Constants on a device, made once per key and dropped when a device has too many.

    A CUDA graph reads the constants that it captured at every replay: they are retained for good.

    Args:
        max_entries: number of entries of a device, captured ones aside, at which all others are
            dropped.
        copies: whether making an entry copies to the device. Only those that do not can be made
            inside the capture of a CUDA graph.
    """

    def __init__(self, max_entries: int, *, copies: bool = True) -> None:
        self.max_entries = max_entries
        self.copies = copies
        self.entries: dict[torch.device, dict[Hashable, Value]] = {}
        self.captured: dict[tuple[torch.device, Hashable], Value] = {}

    def get(self, key: Hashable, device: torch.device, make: Callable[[], Value]) -> Value:
        """The entry of a key, made by `make()` if there is none.

        Raises RuntimeError if it would have to be copied to the device inside the capture of a CUDA
        graph, where that is not allowed.
        """
        capturing = is_capturing(device)
        entries = self.entries.get(device)
        if entries is None:
            entries = self.entries[device] = {}
        found = entries.get(key)
        if found is None:
            found = self.captured.get((device, key))
        if found is None and capturing and not self.copies:
            found = make()
        if found is None:
            if capturing:
                raise RuntimeError(
                    "the first call with a pattern must come before the capture of a CUDA graph: "
                    "call once to warm up"
                )
            if len(entries) >= self.max_entries:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)  # kernels may still be reading them
                entries.clear()
            found = entries[key] = make()
        if capturing:
            self.captured[device, key] = found
        return found


def is_capturing(device: torch.device) -> bool:
    """True while a CUDA graph is captured on the current stream of the device.

    Asking the driver also makes the CUDA context that a new thread does not have yet. Every call
    needs it early: tensor descriptors are encoded before the launch.
    """
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def int32_table(rows: list[Any], device: torch.device) -> torch.Tensor:
    """An int32 tensor on the device.

    Compiled code warms up inside the memory pool of the CUDA graph that it is about to capture, and
    later takes that memory back. The tensor is therefore made by a separate thread, which does not
    allocate from that pool.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(torch.tensor, rows, dtype=torch.int32, device=device).result()
