"""Compile the kernel that joins partial results, without a GPU; print the order of what it does.

A line a dtype: the instructions that load from memory, wait for the program's other warps, and
store, in order. A process of its own (`test_triton_compiled.py`).
"""

from __future__ import annotations

import re
from typing import Any

import torch

from tests.impl.triton.compile_forms import merge
from tests.impl.triton.without_gpu import launches_to

INSTRUCTIONS = re.compile(r"\b(ld\.global|st\.global|bar\.sync)")


def launched(kernel: Any, programs: int, key: Any, *arguments: Any, **constants: Any) -> None:
    built = kernel.function.run(*arguments, grid=(programs,), warmup=True, **constants)
    print(*INSTRUCTIONS.findall(built.asm["ptx"]), flush=True)


if __name__ == "__main__":
    with launches_to(launched):
        for dtype in (torch.bfloat16, torch.float32):
            merge(dtype, 128)
