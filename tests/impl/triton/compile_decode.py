"""Compiles the decoding kernels, without a GPU; prints each launch's shared memory and its limit.

The Hopper table is to leave room for two programs on a multiprocessor, the portable one to fit any
GPU of capability 8.0 and later. Both are compiled for Hopper, which Triton here can always do.

A process of its own (`test_triton_compiled.py`): in the interpreter nothing can be compiled.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spattention.impl.triton.config import BLOCK_P, DECODE_COUNTS, block_d, decode_launch
from spattention.impl.triton.decode import kernels as decode

TYPES = {"p_start": "*i64", "p_offsets": "*i64", "p_lengths": "*i64", "p_sinks": "*fp32"}
INTEGERS = ("p_chunks", "p_bands", "p_key_start", "p_ranges")
LIMITS = {(9, 0): 113 * 1024, (8, 6): 99 * 1024}


def shared_memory(kernel: Any, element: str, constants: dict[str, Any], options: Any) -> int:
    """Bytes that one program of the compiled kernel takes."""
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            kind = (
                "*i32" if name in INTEGERS else "*fp32" if "part" in name or "lse" in name else ""
            )
            signature[name] = TYPES.get(name, kind or f"*{element}")
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
        if signature[name] != "constexpr" and name not in (*DECODE_COUNTS, "scale"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return compiled.metadata.shared


def compile_launch(
    itemsize: int, element: str, head_dim: int, rows: int, capability: tuple[int, int]
) -> None:
    """Both kernels, as `decode_launch` has them run on a GPU of this capability."""
    launch = decode_launch(itemsize, head_dim, rows, capability)
    common = {"HEAD_DIM": head_dim, "BLOCK_D": block_d(head_dim), "PRECISE": itemsize == 4}
    chunks = {
        **common,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "STAGES": launch.num_stages,
        "INTERVALS": 2,
        "RINGS": True,
        "START_ON_DEVICE": True,
        "HAS_KEY_START": True,
    }
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    join = {**common, "BLOCK_P": BLOCK_P, "HAS_SINKS": True}
    for kernel, constants, built in (
        (decode.chunk_kernel, chunks, options),
        (decode.join_kernel, join, {"num_warps": 4}),
    ):
        print(shared_memory(kernel, element, constants, built), LIMITS[capability], flush=True)


def main() -> None:
    for capability in LIMITS:
        compile_launch(2, "bf16", 128, 64, capability)
    compile_launch(2, "bf16", 128, 1, (9, 0))
    # The tables say the same of the rest.
    compile_launch(2, "bf16", 80, 64, (8, 6))
    compile_launch(2, "fp16", 256, 16, (8, 6))
    compile_launch(4, "fp32", 256, 1, (8, 6))
    compile_launch(4, "fp32", 128, 16, (8, 6))


if __name__ == "__main__":
    main()
