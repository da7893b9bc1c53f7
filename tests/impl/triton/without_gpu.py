"""Kernel launches as an H200 or another GPU would get them, on a machine without a GPU.

The public operators run on CPU tensors. Every kernel is bound and specialised by Triton's own JIT
for the GPU, but nothing is launched. Needs `TRITON_INTERPRET=0`: the interpreter
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

from spattention.impl.triton import call, op
from spattention.impl.triton.compiled import CompiledKernelCache
from spattention.impl.triton.constants import ConstantCache
from spattention.impl.triton.decode import plan as decode_plan
from spattention.impl.triton.hopper import planning

HOPPER = GPUTarget("cuda", 90, 32)
Launch = Callable[..., None]
# Triton keeps what it compiled by the number of the device.
DEVICES: dict[GPUTarget, int] = {}


@contextmanager
def launches_to(
    launched: Launch, compute_capability: tuple[int, int] = (9, 0), target: GPUTarget = HOPPER
) -> Iterator[None]:
    """Call `launched(kernel, programs, specialization_key, *arguments, **constants)` for every
    launch; the rules choose what a GPU of this capability would get. Kernels are compiled for
    `target`.
    """
    device_number = DEVICES.setdefault(target, len(DEVICES))
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: device_number,
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(driver)

    def capability(device: torch.device) -> tuple[int, int]:
        return compute_capability

    def properties(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(multi_processor_count=132)

    def launch(self: CompiledKernelCache, *arguments: Any, **constants: Any) -> None:
        launched(self, *arguments, **constants)

    with (
        mock.patch.object(CompiledKernelCache, "__call__", launch),
        mock.patch.object(op, "INTERPRETED", True),  # so that tensors of the CPU are taken
        mock.patch.object(planning, "triton_is_tested", return_value=True),
        mock.patch.object(call, "compute_capability", capability),
        mock.patch.object(call, "_calls", ConstantCache(max_entries=1024, copies=False)),
        mock.patch.object(decode_plan, "compute_capability", capability),
        mock.patch.object(decode_plan, "_plans", ConstantCache(max_entries=1024)),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
        mock.patch.object(torch.cuda, "get_device_properties", properties),
        mock.patch.object(torch.version, "hip", "7.0" if target.backend == "hip" else None),
    ):
        yield
