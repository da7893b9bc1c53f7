"""Options of `spattention tune`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Pass = Literal["forward", "forward_persistent", "query_gradient", "key_gradient", "backward"]


@dataclass(frozen=True)
class Options:
    """Time the kernels with other block sizes, warps and stages, and print the fastest.

    Nothing is changed by it: the launches that users get are the written rule in
    `impl/triton/config.py`, and what this command prints is in the form that stands there. Every
    launch is compiled first, about a second each; where the output is no terminal, each is a line.

    Args:
        kernels: Which to time: those that this GPU would run, the portable ones, or those for
            Hopper.
        passes: Which passes, none for all. The portable kernels have forward, query_gradient and
            key_gradient; those for Hopper forward, forward_persistent (for long bands) and
            backward.
        head_dim: D.
        dtype: Of query, key and value.
        batch: Batch size of the timed case.
        heads: Its heads.
        length: Its length, in tokens.
        blocks: Block sizes to try, for queries and for keys.
        warps: Warps to try.
        stages: Blocks in flight to try; the Hopper kernels have their own.
        best: How many to print of each pass.
    """

    kernels: Literal["default", "portable", "hopper"] = "default"
    passes: tuple[Pass, ...] = ()
    head_dim: int = 128
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    batch: int = 1
    heads: int = 16
    length: int = 16384
    blocks: tuple[int, ...] = (32, 64, 128)
    warps: tuple[int, ...] = (4, 8)
    stages: tuple[int, ...] = (2,)
    best: int = 3
