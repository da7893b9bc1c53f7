"""Losses in bfloat16 by context parallelism, beside those of one GPU.

Training doubles small differences every few steps until curves are as far apart as they can be, so
one pair of curves tells little. Here each seed has a curve of one GPU for every split of a step's
rows into micro-batches, and one of context parallelism. Does the latter lie no farther from the
former than those lie apart? The summary answers with the mean excess over seeds, which is at most 0
if so, the interval that holds it with 95 % confidence, and the distances of every seed.

Splits sum over rows in another order, and share every bit of a row's forward pass. Attention on
shards sums over keys in another order, as other kernels of one GPU do, of which a seed may have a
curve too:

    torchrun --nproc-per-node 2 -m benchmarks.parallel --losses --curves one parallel other \
        --output curves.json
    python -m benchmarks.parallel_losses curves.json --output losses.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from spattention.benchmarking.results import write_rows
from spattention.impl import reference

from .parallel_training import drawn_tokens, llama
from .rank import Machine, Row

SPLITS = ((4,), (2, 2), (3, 1))  # rows of the micro-batches of a step of one GPU
FIRST = 60  # steps, before small differences have grown
OTHER = "one GPU, other kernels"
WAYS = {"context_parallelism": "context parallelism", "other_kernels": OTHER}
COMPARED = (
    ("context_parallelism", "one_gpu"),
    ("other_kernels", "one_gpu"),
    ("context_parallelism", "other_kernels"),
)
# Student's t for an interval of 95 %, by degrees of freedom from 1 on; the last for all above.
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


def losses(options: argparse.Namespace, machine: Machine) -> Iterator[Row]:
    """Curves of all seeds. Those of one GPU are shared out over the ranks."""
    mesh = dist.init_device_mesh(machine.device.type, (machine.ranks,))
    for seed in options.seeds:
        common = {"part": "losses", "seed": seed, "context": options.context}
        found: list[Any] = [{}] * machine.ranks
        if "one" in options.curves:
            mine = {
                str(split): train(options, machine, seed, split, None)
                for split in SPLITS[machine.rank :: machine.ranks]
            }
            dist.all_gather_object(found, mine)
        for way, curve in sorted((way, curve) for curves in found for way, curve in curves.items()):
            yield {**common, "way": f"one GPU, {way}", "ranks": 1, **ends(curve), "losses": curve}
        if "other" in options.curves:

            def other(seed: int = seed) -> list[float]:
                with other_kernels(machine.device):
                    return train(options, machine, seed, SPLITS[0], None)

            curve = machine.alone(other)
            yield {**common, "way": OTHER, "ranks": 1, **ends(curve), "losses": curve}
        if "parallel" in options.curves:
            curve = train(options, machine, seed, SPLITS[0], mesh)
            row = {**common, "way": "context parallelism", "ranks": machine.ranks}
            yield {**row, **ends(curve), "losses": curve}


def ends(curve: list[float]) -> Row:
    return {"first_loss": curve[0], "last_loss": curve[-1]}


@contextmanager
def other_kernels(device: torch.device) -> Iterator[None]:
    """Attention of one GPU by the portable kernels instead of those for Hopper, on the CPU by a
    dense mask: it sums in another order."""
    attention, binding = (import_module(f"spattention.{name}") for name in ("attention", "binding"))
    with ExitStack() as patches:
        for module in (attention, binding):  # a form of a call remembers the kernels that ran
            patches.enter_context(mock.patch.object(module, "form_of", return_value=None))
        if device.type == "cuda":
            hopper = import_module("spattention.impl.triton.hopper")
            patches.enter_context(mock.patch.object(hopper, "plan", return_value=None))
        else:
            patches.enter_context(mock.patch.object(attention, "choose", return_value=reference))
        yield


def train(
    options: argparse.Namespace,
    machine: Machine,
    seed: int,
    split: tuple[int, ...],
    mesh: Any,
) -> list[float]:
    """Losses of a small Llama; all ranks of a mesh have the same rows."""
    from spattention import hf

    small = {"hidden": min(options.hidden, 512), "layers": min(options.layers, 4)}
    given = argparse.Namespace(**{**vars(options), **small})
    model, _ = llama(given, options.context, machine.device, seed)
    if mesh is not None:
        hf.context_parallel(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows, found = sum(split), []
    for step in range(options.curve_steps):
        tokens = drawn_tokens(step + seed * options.curve_steps, rows, options.context)
        total = torch.zeros((), device=machine.device)
        for part in tokens.to(machine.device).split(split):
            with torch.autocast(machine.device.type, torch.bfloat16):
                loss = model(input_ids=part, labels=part, use_cache=False).loss * len(part) / rows
            loss.backward()
            total += loss.detach()
        if mesh is not None:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= machine.ranks
        optimizer.step()
        optimizer.zero_grad()
        found.append(total)
    return torch.stack(found).tolist()


def distance(curve: list[float], other: list[float]) -> float:
    """Mean distance of two curves."""
    return statistics.fmean(abs(a - b) for a, b in zip(curve, other, strict=True))


def of_seed(curves: list[Row], steps: int) -> dict[str, float]:
    """Mean distances of one seed's curves: between splits of one GPU, and from them to each of the
    other ways."""
    named = {row["way"]: row["losses"][:steps] for row in curves}
    others = {name: named.pop(way) for name, way in WAYS.items() if way in named}
    pairs = list(itertools.combinations(named.values(), 2))
    if not pairs:
        return {}
    found = {"one_gpu": statistics.fmean(itertools.starmap(distance, pairs))}
    for name, curve in others.items():
        found[name] = statistics.fmean(distance(curve, each) for each in named.values())
    return found


def summary(curves: list[Row]) -> Iterator[Row]:
    """Distances of the first steps and of all: means over pairs and seeds, and the excess of one
    way over another with its interval over seeds."""
    seeds = sorted({row["seed"] for row in curves})
    length = len(curves[0]["losses"])
    for steps, (way, base) in itertools.product(sorted({min(FIRST, length), length}), COMPARED):
        rows = [of_seed([row for row in curves if row["seed"] == seed], steps) for seed in seeds]
        both = [(row[base], row[way]) for row in rows if way in row and base in row]
        if len(both) < 2:  # their scatter is to be known
            continue
        less, more = ([*each] for each in zip(*both))
        excess = [b - a for a, b in both]
        mean = statistics.fmean(excess)
        error = statistics.stdev(excess) / math.sqrt(len(excess))
        half = T_95[min(len(excess) - 1, len(T_95)) - 1] * error
        yield {
            "part": "distances",
            "way": WAYS[way],
            "compared_with": WAYS.get(base, "one GPU, splits"),
            "steps": steps,
            "seeds": len(excess),
            f"of_{base}": statistics.fmean(less),
            f"of_{way}": statistics.fmean(more),
            "excess": mean,
            "excess_95": [mean - half, mean + half],
            "no_farther": mean <= 0,
            "seeds_no_farther": sum(each <= 0 for each in excess),
            "by_seed": {f"of_{base}": less, f"of_{way}": more},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the loss curves of several seeds.")
    parser.add_argument("files", type=Path, nargs="+", help="of benchmarks.parallel --losses")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    options = parser.parse_args()
    read = [json.loads(path.read_text(encoding="utf-8")) for path in options.files]
    curves = [row for each in read for row in each["rows"] if row["part"] == "losses"]
    if not any(summary(curves)):
        parser.error("the files must hold at least two seeds, whose scatter is to be known")
    environment = {name: read[0][name] for name in ("gpu", "triton") if name in read[0]}
    rows = [*summary(curves), *curves]
    what = "loss curves in bfloat16: context parallelism and one GPU"
    settings = {**read[0]["settings"], "seeds": sorted({row["seed"] for row in curves})}
    write_rows(
        options.output, what, settings, rows, commit=read[0]["commit"], environment=environment
    )
    for row in rows:
        if row["part"] == "distances":
            print(row)


if __name__ == "__main__":
    main()
