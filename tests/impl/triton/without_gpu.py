"""Kernel launches as an H200 would get them, on a machine without a GPU.

The public operators run on CPU tensors. Every kernel is bound and specialised by Triton's own JIT
for compute capability 9.0, but nothing is launched. Needs `TRITON_INTERPRET=0`: the interpreter
specialises nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from spattention.impl.triton import config, launch, op
from spattention.impl.triton.compiled import Kernel
from spattention.impl.triton.decode import launch as decode_launch

TARGET = GPUTarget("cuda", 90, 32)
DRIVER = SimpleNamespace(
    get_current_target=lambda: TARGET,
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
)
Launch = Callable[..., None]


@contextmanager
def hopper(launched: Launch) -> Iterator[None]:
    """Call `launched(kernel, programs, depends, *arguments, **constants)` for every launch."""
    triton.runtime.driver.set_active(DRIVER)

    def capability(device: torch.device) -> tuple[int, int]:
        return (9, 0)

    def properties(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(multi_processor_count=132)

    def call(self: Kernel, *arguments: Any, **constants: Any) -> None:
        launched(self, *arguments, **constants)

    with (
        mock.patch.object(Kernel, "__call__", call),
        mock.patch.object(op, "INTERPRETED", True),  # so that tensors of the CPU are taken
        mock.patch.object(config, "HOPPER_TRITON", triton.__version__),
        mock.patch.object(launch, "compute_capability", capability),
        mock.patch.object(decode_launch, "compute_capability", capability),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
        mock.patch.object(torch.cuda, "get_device_properties", properties),
    ):
        yield


@contextmanager
def plans(order: int, persistent: bool, split_backward: bool) -> Iterator[None]:
    """What the rules choose for larger calls, for every call."""
    with (
        mock.patch.object(launch, "order", return_value=order),
        mock.patch.object(launch, "is_long", return_value=persistent),
        mock.patch.object(launch, "is_apart", return_value=split_backward),
    ):
        yield
