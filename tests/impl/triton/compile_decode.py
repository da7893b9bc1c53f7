"""Compile the decoding kernels without a GPU; print each launch's shared memory and its limit.

The Hopper table leaves room for two programs on a multiprocessor. The portable one fits any GPU of
capability 8.0 and later. Both are compiled for Hopper, which Triton can do everywhere.

A process of its own (`test_triton_compiled.py`): in the interpreter nothing can be compiled.
"""

from __future__ import annotations

from typing import Any

import torch

import spattention as spa
from spattention.impl import triton as kernels
from tests.impl.triton.small_cases import rings
from tests.impl.triton.without_gpu import launches_to

LIMITS = {(9, 0): 113 * 1024, (8, 6): 99 * 1024}
PATTERN = spa.BandPattern((((0, 20), (40, 90)),) * 4, 256)


def compile_launch(
    dtype: torch.dtype, head_dim: int, rows: int, capability: tuple[int, int]
) -> None:
    """Both kernels, with `rows` queries per key/value head (4 heads of `rows / 4` tokens, or 1)."""

    def launched(kernel: Any, programs: int, key: Any, *arguments: Any, **constants: Any) -> None:
        built = kernel.function.run(*arguments, grid=(programs,), warmup=True, **constants)
        print(built.metadata.shared, LIMITS[capability], flush=True)

    key_heads, tokens = (4, 1) if rows == 1 else (1, rows // 4)
    query = torch.zeros(1, 4, tokens, head_dim, dtype=dtype)
    store = spa.BandStore(PATTERN, 1, key_heads, head_dim, dtype=dtype, slack=16)
    first = torch.zeros(1, dtype=torch.int32)
    with launches_to(launched, capability):
        kernels.attend_rings(
            query,
            store.keys,
            store.values,
            PATTERN,
            **rings(store),
            scale=0.1,
            sinks=torch.zeros(4, dtype=dtype),
            key_start=first,
        )


def main() -> None:
    for capability in LIMITS:
        compile_launch(torch.bfloat16, 128, 64, capability)
    compile_launch(torch.bfloat16, 128, 1, (9, 0))
    # The tables say the same of the rest.
    compile_launch(torch.bfloat16, 80, 64, (8, 6))
    compile_launch(torch.float16, 256, 16, (8, 6))
    compile_launch(torch.float32, 256, 1, (8, 6))
    compile_launch(torch.float32, 128, 16, (8, 6))


if __name__ == "__main__":
    main()
