"""`spattention tune`: which launch of each kernel is fastest on this GPU."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ..bands import BandPattern
from ..benchmarking import timing
from .bounds import (
    LARGEST,
    LARGEST_GRID,
    LARGEST_HEAD_DIM,
    LARGEST_LENGTH,
    check_each,
    check_range,
    check_size,
)
from .options.tune import Options, Pass

if TYPE_CHECKING:
    from ..impl.triton.config import LaunchConfig

# The portable kernels have a launch for each gradient. Those for Hopper have one for all gradients,
# and a persistent forward pass for long bands.
PORTABLE: tuple[Pass, ...] = ("forward", "query_gradient", "key_gradient")
HOPPER: tuple[Pass, ...] = ("forward", "forward_persistent", "backward")
DEVICE = "cuda"
MOST_STAGES = 16  # blocks in flight; shared memory holds fewer


def main(options: Options) -> None:
    """Try every launch of every pass, on `shared_local` bands."""
    check(options)
    timing.needs_gpu("tune")
    run = None if options.kernels == "portable" else _runner(options, hopper=True)
    if options.kernels == "hopper" and run is None:
        raise ValueError("`--kernels hopper` does not cover this GPU, dtype or head_dim")
    hopper = run is not None
    _check_launches(options, hopper)
    run = run or _runner(options, hopper=False)
    assert run is not None
    console = Console(width=None if Console().is_terminal else 120)
    for name in passes(options, hopper):
        found = _try(run, name, candidates(options, name, hopper), console)
        table = Table(title=f"{'Hopper' if hopper else 'portable'} kernels, {name}")
        for heading in ("milliseconds", "launch"):
            table.add_column(heading, no_wrap=True)
        for milliseconds, launch in found[: options.best]:
            table.add_row(f"{milliseconds:.4f}", str(launch))
        console.print(table)


def check(options: Options) -> None:
    """Raise ValueError for an option that breaks a rule on every GPU."""
    check_range(
        options,
        head_dim=(1, LARGEST_HEAD_DIM),
        batch=(1, LARGEST_GRID),
        heads=(1, LARGEST_GRID),
        length=(1, LARGEST_LENGTH),
        best=(1, LARGEST),
    )
    check_size(
        "--length",
        batch=options.batch,
        heads=options.heads,
        length=options.length,
        head_dim=options.head_dim,
    )
    for name, least, most in (("blocks", 16, 256), ("warps", 1, 32)):
        values = getattr(options, name)
        check_each(f"--{name}", values, least, most)
        for value in values:
            if value & (value - 1):
                raise ValueError(f"`--{name}` must be powers of two, got {value}")
    check_each("--stages", options.stages, 1, MOST_STAGES)
    if len(set(options.passes)) != len(options.passes):
        raise ValueError(f"`--passes` must name each once, got {' '.join(options.passes)}")
    if options.kernels != "default":  # which the GPU decides
        _check_launches(options, hopper=options.kernels == "hopper")


def _check_launches(options: Options, hopper: bool) -> None:
    for name in passes(options, hopper):
        if not candidates(options, name, hopper):
            raise ValueError(
                f"`--blocks` and `--warps` must fit a launch of {name}, got {options.blocks} with "
                f"{options.warps}"
            )


def passes(options: Options, hopper: bool) -> tuple[Pass, ...]:
    """Those that were asked for; ValueError for one that the kernels do not have."""
    known = HOPPER if hopper else PORTABLE
    for name in options.passes:
        if name not in known:
            raise ValueError(
                f"`--passes` of the {'Hopper' if hopper else 'portable'} kernels must be of "
                f"{', '.join(known)}, got {name}"
            )
    return options.passes or known


def candidates(options: Options, name: str, hopper: bool) -> list[LaunchConfig]:
    """The launches to try for a pass."""
    from ..impl.triton.config import LaunchConfig

    blocks = itertools.product(options.blocks, options.blocks, options.warps)
    found = []
    for m, n, warps in blocks:
        # A warpgroup of the Hopper kernels owns 64 rows of the block that stays: of queries, and of
        # keys too where one launch has all gradients. The persistent pass has two warpgroups.
        persistent = name == "forward_persistent"
        stays = (m, n) if name == "backward" else (m // 2,) if persistent else (m,)
        if hopper and (any(rows != 16 * warps for rows in stays) or min(m, n) < 32):
            continue
        stages = options.stages if not hopper or persistent else (2,)
        found += [LaunchConfig(m, n, warps, s) for s in stages]
    return found


def _try(
    run: Callable[..., None], name: str, launches: Sequence[LaunchConfig], console: Console
) -> list[tuple[float, LaunchConfig]]:
    """Milliseconds and launch, the fastest first, without those that cannot run."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    found = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=len(launches))
        for launch in launches:
            time = _time(run, name, launch)
            if isinstance(time, float):
                found.append((time, launch))
            if not console.is_terminal:
                shown = f"{time:.4f} ms" if isinstance(time, float) else time
                console.print(f"{name}: {shown}, {launch}", highlight=False)
            progress.advance(task)
    return sorted(found, key=operator.itemgetter(0))


def _time(run: Callable[..., None], name: str, launch: LaunchConfig) -> float | str:
    """Milliseconds, or why there are none."""
    from triton.runtime.errors import OutOfResources

    try:
        return timing.graph_milliseconds(lambda: run(name, launch), budget=5.0)
    except OutOfResources:
        return "too large for this GPU"
    except RuntimeError as error:
        # Triton 3.6 fails so on some launches, such as dQ in 128 x 128 with 4 warps.
        if "PassManager" not in str(error):
            raise
        return "not compiled by this Triton"


def _runner(options: Options, hopper: bool) -> Callable[..., None] | None:
    """A function that runs one pass with one launch; None where the Hopper kernels do not cover the
    case.
    """
    from ..impl.triton import hopper as hopper_kernels
    from ..impl.triton.arguments import Positions, RowStats
    from ..impl.triton.call import BackwardTensors, Call, ForwardTensors
    from ..impl.triton.hopper.planning import pitch
    from ..impl.triton.portable import launch as portable

    shape = (options.batch, options.heads, options.length, options.head_dim)
    query, key, value, d_out = (
        torch.randn(shape, device=DEVICE, dtype=getattr(torch, options.dtype)) for _ in range(4)
    )
    bands = BandPattern.shared_local(options.heads, options.length).flat
    scale = options.head_dim**-0.5
    call = Call(query, key, bands, scale, 0, Positions(None, None, None, None))
    plan = hopper_kernels.plan(call, query, key, value, d_out) if hopper else None
    if hopper and plan is None:
        return None
    out, d_query, d_key, d_value = (torch.empty_like(query) for _ in range(4))
    lse = query.new_empty(shape[:3], dtype=torch.float32)
    pitched = (*shape[:2], pitch(shape[2]))
    stats = RowStats(lse, None, lse.new_empty(pitched), lse.new_empty(pitched))
    forward = ForwardTensors(query, key, value, out, lse, None)
    backward = BackwardTensors(query, key, value, out, d_out, d_query, d_key, d_value)
    portable.forward(call, portable.launches_for(call).forward, forward)

    def run_portable(name: str, launch: LaunchConfig) -> None:
        if name == "forward":
            portable.forward(call, launch, forward)
        elif name == "query_gradient":
            portable.query_gradient(call, launch, backward, stats)
        else:
            portable.key_gradient(call, launch, backward, stats)

    def run_hopper(name: str, launch: LaunchConfig) -> None:
        from ..impl.triton.hopper import launch as launching

        assert plan is not None
        launches = replace(plan.launches, **{name: launch})
        changed = replace(plan, launches=launches, persistent=name == "forward_persistent")
        if name == "backward":
            launching.backward(call, changed, backward, stats)
        else:
            launching.forward(call, changed, forward)

    return run_portable if plan is None else run_hopper
