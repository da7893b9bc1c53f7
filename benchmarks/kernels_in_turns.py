"""Time the kernels of several source trees or Triton versions in turns on one GPU.

A side is a name and the PYTHONPATH of its processes: a `src` folder, and perhaps a folder with
another Triton. Every turn runs each side once, in a process of its own, in an order that changes
from turn to turn. Times of the attention table's fifteen cases are medians of graph replays, and
the result is the median over the turns. Long cases differ by where their buffers lie: with
`--placements` a process takes the median over several places. A side that is given twice shows the
scatter of a side against itself. Other shapes are given as BxHxN, or as BxH/KxNxD with K key heads
and head_dim D. A side runs as the rules choose; `--plan` sets fields of its `HopperPlan` instead.
`host_time.py` times the host.

    python -m benchmarks.kernels_in_turns --side old=old/src --side new=src --side again=old/src
    python -m benchmarks.kernels_in_turns --side 3.6=src --side 3.9=src:triton390
    python -m benchmarks.kernels_in_turns --shapes 1x32/8x16384x64 --side ...
    python -m benchmarks.kernels_in_turns --side short=src --side drawn=src \\
        --plan short persistent=false --plan drawn persistent=true order=0
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

SHAPES = ("1x8x4096", "4x16x4096", "16x8x1024", "1x16x16384", "1x16x65536")
HEAD_DIM = 128
PATTERNS = ("exclusive", "shared_local", "shared_local geometric")
REST = 0.25  # seconds before a measurement: a power limit looks back over a tenth or two
BUDGET = 30.0  # milliseconds of replays of a case
MOVED = 37 << 20  # bytes between two places of the inputs


def sizes_of(shape: str) -> tuple[int, int, int, int, int]:
    """Batch, heads, key heads, tokens and head_dim of "BxHxN" or "BxH/KxNxD"."""
    batch, heads, length, *rest = shape.split("x")
    count, _, key_heads = heads.partition("/")
    head_dim = int(rest[0]) if rest else HEAD_DIM
    return int(batch), int(count), int(key_heads or count), int(length), head_dim


def fields_of(settings: Sequence[str]) -> dict[str, Any]:
    """Fields of a plan from "FIELD=VALUE", with values as in JSON."""
    pairs = [setting.partition("=") for setting in settings]
    return {name: json.loads(value) for name, _, value in pairs}


def change_plans(hopper: Any, fields: dict[str, Any]) -> None:
    """Every plan of this process with these fields of `HopperPlan`."""
    rule = hopper.plan

    def plan(*inputs: Any) -> Any:
        found = rule(*inputs)
        if found is None:
            return None
        typed = {name: type(getattr(found, name))(value) for name, value in fields.items()}
        return replace(found, **typed)

    hopper.plan = plan


def worker(
    shapes: Sequence[str], names: Sequence[str], placements: int, settings: Sequence[str]
) -> dict[str, Any]:
    """All times of this process, in milliseconds: medians over that many places in memory."""
    import torch
    import triton

    import spattention as spa
    from spattention.impl.triton import hopper

    if settings:
        change_plans(hopper, fields_of(settings))

    def pattern_of(name: str, heads: int, length: int) -> spa.BandPattern:
        make, _, widths = name.partition(" ")
        more = {"widths": widths} if widths else {}
        found: spa.BandPattern = getattr(spa.BandPattern, make)(heads, length, **more)
        return found

    def inputs(shape: str) -> list[torch.Tensor]:
        generator = torch.Generator("cuda").manual_seed(0)
        batch, heads, key_heads, length, head_dim = sizes_of(shape)
        return [
            torch.randn(
                (batch, count, length, head_dim),
                device="cuda",
                dtype=torch.bfloat16,
                generator=generator,
            ).requires_grad_(i < 3)
            for i, count in enumerate((heads, key_heads, key_heads, heads))
        ]

    found: dict[str, list[float]] = {}
    for shape in shapes:
        _, heads, _, length, _ = sizes_of(shape)
        taken = []  # memory that moves what comes after it
        for _ in range(placements):
            tensors = inputs(shape)
            for name in names:
                pattern = pattern_of(name, heads, length)
                passes = ("forward", "forward + backward")
                for each, call in zip(passes, calls(torch, spa, tensors, pattern)):
                    found.setdefault(f"{shape} {name}, {each}", []).append(replayed(torch, call))
            del tensors, call
            torch.cuda.empty_cache()
            taken.append(torch.empty(MOVED, dtype=torch.uint8, device="cuda"))
    times = {name: statistics.median(each) for name, each in found.items()}
    return {
        "source": str(Path(spa.__file__).parent),
        "triton": triton.__version__,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(),
        "times": times,
    }


def calls(torch: Any, spa: Any, tensors: Sequence[Any], pattern: Any) -> list[Callable[[], None]]:
    """The forward pass of a case, and both passes."""
    query, key, value, d_out = tensors

    def forward() -> None:
        with torch.no_grad():
            spa.band_attention(query, key, value, pattern, impl="triton")

    def total() -> None:
        out = spa.band_attention(query, key, value, pattern, impl="triton")
        torch.autograd.grad(out, (query, key, value), d_out)

    return [forward, total]


def replayed(torch: Any, call: Callable[[], None]) -> float:
    """Median milliseconds of a captured call; short ones are replayed several times between two
    events, because a single replay would start some microseconds after its event.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    time.sleep(REST)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run(replays: int) -> float:
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / replays

    once = max(run(3), 1e-3)
    together = max(1, round(1.0 / once))
    samples = min(60, max(9, round(BUDGET / (once * together))))
    return statistics.median(run(together) for _ in range(samples))


def run_side(
    path: str,
    shapes: Sequence[str],
    names: Sequence[str],
    placements: int,
    settings: Sequence[str] = (),
) -> dict[str, Any]:
    """One process of a side; raises RuntimeError where it fails or imports another tree."""
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, __file__, "--worker", "--shapes", *shapes, "--patterns", *names]
    command += ["--placements", str(placements)]
    if settings:
        command += ["--plan", "", *settings]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd="/"
    )
    if done.returncode:
        raise RuntimeError(f"the process with PYTHONPATH={path} failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    first = Path(path.split(os.pathsep)[0]).resolve()
    if not Path(found["source"]).resolve().is_relative_to(first):
        raise RuntimeError(f"PYTHONPATH={path} imported spattention from {found['source']}")
    return found


def summary(sides: dict[str, list[dict[str, float]]]) -> list[tuple[str, list[float]]]:
    """Name and medians of every measurement, one per side."""
    names = next(iter(sides.values()))[0]
    return [
        (name, [statistics.median(turn[name] for turn in turns) for turns in sides.values()])
        for name in names
    ]


def show(sides: dict[str, list[dict[str, float]]]) -> None:
    """Print the medians, and their ratios to the first side's."""
    print(f"{'':45}" + "".join(f"{name:>12}" for name in sides) + "   over the first")
    for name, medians in summary(sides):
        ratios = "".join(f"{each / medians[0]:8.3f}" for each in medians[1:])
        print(f"{name:45}" + "".join(f"{each:12.4f}" for each in medians) + "  " + ratios)


def main() -> int:
    """Run the turns; write results after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", action="append", default=[], metavar="NAME=PYTHONPATH")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="SHAPE")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, choices=PATTERNS)
    parser.add_argument(
        "--placements", type=int, default=1, help="places of the inputs in memory, in each process"
    )
    parser.add_argument(
        "--plan",
        action="append",
        default=[],
        nargs="+",
        metavar=("NAME", "FIELD=VALUE"),
        help="fields of a side's `HopperPlan`, with values as in JSON: persistent=true order=0",
    )
    parser.add_argument("--commit", help="to record: a side of another tree has another")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        settings = options.plan[0][1:] if options.plan else []
        print(json.dumps(worker(options.shapes, options.patterns, options.placements, settings)))
        return 0
    paths = {}
    for side in options.side:
        name, separator, path = side.partition("=")
        if not separator or name in paths:
            parser.error(f"`--side` must be NAME=PYTHONPATH with different names, got {side!r}")
        paths[name] = os.pathsep.join(str(Path(each).resolve()) for each in path.split(os.pathsep))
    if len(paths) < 2:
        parser.error("`--side` must be given at least twice")
    plans = {name: settings for name, *settings in options.plan}
    if not plans.keys() <= paths.keys():
        parser.error(f"`--plan` must name a side, got {', '.join(plans.keys() - paths.keys())}")
    sides: dict[str, list[dict[str, float]]] = {name: [] for name in paths}
    facts: dict[str, dict[str, Any]] = {}
    for turn in range(options.turns):
        order = list(paths)
        shift = turn % len(order)
        for name in order[shift:] + order[:shift]:
            cases = (options.shapes, options.patterns, options.placements)
            found = run_side(paths[name], *cases, plans.get(name, ()))
            sides[name].append(found.pop("times"))
            facts[name] = found | ({"plan": plans[name]} if name in plans else {})
            print(f"turn {turn + 1} of {options.turns}: {name} {found}", flush=True)
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            result = {
                "what": "milliseconds of cases, in turns",
                "command": "python -m benchmarks.kernels_in_turns " + shlex.join(sys.argv[1:]),
                "commit": options.commit,
                "sides": facts,
                "medians": {name: dict(zip(paths, medians)) for name, medians in summary(sides)},
                "turns": sides,
            }
            options.output.write_text(json.dumps(result, indent=1) + "\n")
    show(sides)
    return 0


if __name__ == "__main__":
    sys.exit(main())
