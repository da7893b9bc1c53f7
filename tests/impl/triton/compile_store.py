"""Compile the kernel that stores an engine's new keys, without a GPU; print its shared memory.

A process of its own (`test_triton_compiled.py`): in the interpreter nothing can be compiled.
"""

from __future__ import annotations

from typing import Any

import torch

from spattention.serving.class_store import store
from tests.impl.triton.without_gpu import launches_to
from tests.serving.class_caches import given


def launched(kernel: Any, programs: int, key: Any, *arguments: Any, **constants: Any) -> None:
    built = kernel.function.run(*arguments, grid=(programs,), warmup=True, **constants)
    print(built.metadata.name, built.metadata.shared, flush=True)


if __name__ == "__main__":
    with launches_to(launched):
        for head_dim in (128, 20):
            store(*given(0, torch.bfloat16, head_dim))
