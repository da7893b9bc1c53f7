"""`spattention tune`: which launch of each kernel is fastest on this GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from ..bands import BandPattern
from . import measure

PASSES = ("forward", "query_gradient", "key_gradient")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Options:
    """Time the kernels with other block sizes, warps and stages, and print the fastest.

    Nothing is changed by it: the launches that users get are the written rule in
    `impl/triton/config.py`, and what this command prints is in the form that stands there.

    Args:
        head_dim: D.
        dtype: Of query, key and value.
        batch: Batch size of the timed case.
        heads: Its heads.
        length: Its length, in tokens.
        blocks: Block sizes to try, for queries and for keys.
        warps: Warps to try.
        stages: Blocks in flight to try; the Hopper kernels have their own.
    """

    head_dim: int = 128
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    batch: int = 1
    heads: int = 16
    length: int = 16384
    blocks: tuple[int, ...] = (32, 64, 128)
    warps: tuple[int, ...] = (4, 8)
    stages: tuple[int, ...] = (2, 3)


def main(options: Options) -> None:
    """Try every launch of every pass, on `shared_local` bands."""
    if not torch.cuda.is_available():
        raise ValueError("`spattention tune` needs a CUDA device, and there is none")
    from ..impl.triton.config import LaunchConfig

    for hopper in (False, True):
        run = _runner(options, hopper)
        if run is None:
            continue
        table = Table(title="Hopper kernels" if hopper else "portable kernels")
        for heading in ("pass", "milliseconds", "launch"):
            table.add_column(heading)
        stages = (2,) if hopper else options.stages
        for name in PASSES:
            found = []
            for m, n, w, s in itertools.product(
                options.blocks, options.blocks, options.warps, stages
            ):
                launch = LaunchConfig(m, n, w, s)
                # A warpgroup of the Hopper kernels owns 64 rows of the block that stays.
                stays = n if name == "key_gradient" else m
                if hopper and (stays != 16 * w or min(m, n) < 32):
                    continue
                found.append((_time(run, name, launch), launch))
            for milliseconds, launch in sorted(found, key=lambda pair: pair[0])[:3]:
                table.add_row(name, f"{milliseconds:.4f}", str(launch))
        Console(width=120).print(table)


def _time(run: Callable[..., None], name: str, launch: Any) -> float:
    """Milliseconds; infinite where the launch needs more shared memory or registers than there
    are.
    """
    from triton.runtime.errors import OutOfResources

    try:
        return measure.graph_milliseconds(lambda: run(name, launch), budget=5.0)
    except OutOfResources:
        return float("inf")


def _runner(options: Options, hopper: bool) -> Callable[..., None] | None:
    """A function that runs one pass with one launch; None where the Hopper kernels do not cover the
    case.
    """
    from ..impl.triton import launch as launching
    from ..impl.triton.config import pitch

    shape = (options.batch, options.heads, options.length, options.head_dim)
    query, key, value, d_out = (
        torch.randn(shape, device="cuda", dtype=DTYPES[options.dtype]) for _ in range(4)
    )
    bands = BandPattern.shared_local(options.heads, options.length).flat
    scale = options.head_dim**-0.5
    call = launching.Call(query, key, bands, 0, None, None, None, None, scale)
    if hopper and call.hopper is None:
        return None
    portable, special = call.launches, call.hopper
    out, d_query, d_key, d_value = (torch.empty_like(query) for _ in range(4))
    lse = query.new_empty(shape[:3], dtype=torch.float32)
    base, delta = (lse.new_empty((*shape[:2], pitch(shape[2]))) for _ in range(2))
    call.hopper = special if hopper else None
    launching.launch_forward(call, query, key, value, out, lse, None)

    def run(name: str, launch: Any) -> None:
        call.launches = replace(portable, **dict[str, Any]({name: launch}))
        call.hopper = (
            replace(special, **dict[str, Any]({name: launch})) if hopper and special else None
        )
        if name == "forward":
            launching.launch_forward(call, query, key, value, out, lse, None)
        elif name == "query_gradient":
            launching.launch_query_gradient(
                call, query, key, value, out, d_out, d_query, lse, None, base, delta, call.hopper
            )
        else:
            launching.launch_key_gradient(
                call, query, key, value, d_out, d_key, d_value, base, delta, call.hopper
            )

    return run
