"""Forms of the exchange of context parallelism in turns, in one process per GPU.

    git archive 6b5f159 src/spattention/parallel | tar x -C before
    torchrun --nproc-per-node 2 -m benchmarks.exchange_in_turns \
        --before before/src/spattention/parallel --output results.json

First each form's output and gradients are compared with one GPU's. Then all forms are timed, round
after round, with and without their exchange; the result is the median over the rounds. At the end
come the kernels of one pass of each form on every rank, with the time at which each starts.

    before                       the package of `--before`, if that is given
    now                          this one
    now, 16 turns                16 programs a multiprocessor in the persistent forward pass
    now, 8 blocks                a group of ranks of its own, with at most 8 blocks of NCCL
    now, 16 turns, 8 blocks      both
    before, 8 blocks             the same group
    all-gather, Ulysses          the other ways, which have no exchange to hide
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import spattention
from spattention import BandPattern, band_attention
from spattention import parallel as now
from spattention.benchmarking.results import write_rows

from .parallel import draw, gradients, layout, silent, times
from .rank import Machine, Row

LAYOUTS = ("balanced", "contiguous")
NAMES = ("out", "d_query", "d_key", "d_value")


@dataclass(frozen=True)
class Form:
    """One form of the exchange.

    Attributes:
        package: `spattention.parallel`, or the one before.
        group: the ranks.
        turns: programs per multiprocessor of the persistent forward pass; None: as it is.
        attend: name of the operator.
        layout: of the shards.
    """

    package: ModuleType
    group: Any = None
    turns: int | None = None
    attend: str = "sharded_attention"
    layout: str = "balanced"


def load(folder: Path) -> ModuleType:
    """An older `spattention/parallel` as `spattention.parallel_before`."""
    name = "spattention.parallel_before"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spattention.parallel_before = module
    spec.loader.exec_module(module)
    return module


def exchange_of(package: ModuleType) -> ModuleType:
    return sys.modules[f"{package.__name__}.exchange"]


class Turns:
    """Switches the programs per multiprocessor; calls know their plans, so each has its own."""

    def __init__(self) -> None:
        self.calls: dict[int | None, Any] = {}

    @contextmanager
    def __call__(self, turns: int | None) -> Iterator[None]:
        from spattention.impl.triton import call
        from spattention.impl.triton.hopper import planning

        stock = call._calls, planning.WAVES_OF_A_PART
        if turns is not None:
            made = self.calls.setdefault(turns, type(stock[0])(max_entries=4096, copies=False))
            call._calls, planning.WAVES_OF_A_PART = made, turns
        try:
            yield
        finally:
            call._calls, planning.WAVES_OF_A_PART = stock


def forms(options: argparse.Namespace, machine: Machine) -> dict[str, Form]:
    few = None
    if machine.cuda:
        settings = dist.ProcessGroupNCCL.Options()
        settings.config.max_ctas = 8
        few = dist.new_group(pg_options=settings)
    found = {
        "now": Form(now),
        "now, 16 turns": Form(now, turns=16),
        "now, 8 blocks": Form(now, group=few),
        "now, 16 turns, 8 blocks": Form(now, group=few, turns=16),
        "all-gather, balanced": Form(now, attend="gathered_attention"),
        "Ulysses, contiguous": Form(now, attend="ulysses_attention", layout="contiguous"),
    }
    if options.before is not None:
        before = load(options.before)
        found = {"before": Form(before), "before, 8 blocks": Form(before, group=few), **found}
    if options.only:
        found = {name: found[name] for name in options.only}
    if not machine.cuda:
        found = {name: form for name, form in found.items() if "turns" not in name}
    return found


def timeline(run: Callable[[], object]) -> list[list[Any]]:
    """Start and length in microseconds, stream and name of each kernel of more than 8."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    dist.barrier()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    kernels = [
        (event.start_ns(), event.duration_ns(), event.device_resource_id(), event.name())
        for event in recorded.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA
    ]
    first = min(start for start, *_ in kernels)
    return [
        [(start - first) // 1000, length // 1000, stream, name[:48]]
        for start, length, stream, name in sorted(kernels)
        if length > 8000
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="an older spattention/parallel")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--key-heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="names of forms; default all")
    parser.add_argument("--commit", help="recorded where git cannot tell")
    options = parser.parse_args()
    machine = Machine(options.device)
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        if machine.rank != 0:
            return
        settings = {k: str(v) for k, v in vars(options).items() if k not in ("output", "commit")}
        gpu = {}
        if machine.cuda:
            gpu = {
                "gpu": torch.cuda.get_device_name(),
                "triton": version("triton"),
                "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            }
        what = "forms of the exchange of context parallelism in turns"
        write_rows(options.output, what, settings, rows, commit=options.commit, environment=gpu)
        print({k: v for k, v in row.items() if k != "kernels"}, flush=True)

    measure(options, machine, add)
    dist.destroy_process_group()


def measure(options: argparse.Namespace, machine: Machine, add: Callable[[Row], None]) -> None:
    """Compare and time all forms; `add` takes each row."""
    pattern = BandPattern.shared_local(options.heads, options.length, widths="geometric")
    tensors = draw(options, options.length, machine.device)

    def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return band_attention(q, k, v, pattern)

    one = gradients(whole, tensors)
    known, turns = forms(options, machine), Turns()
    layouts = {name: layout(name, options.length, machine.ranks) for name in LAYOUTS}
    mine = {
        name: [shards.split(each, machine.rank, dim=2) for each in tensors]
        for name, shards in layouts.items()
    }

    def attend(form: Form) -> Callable[..., Any]:
        shards = form.package.Shards(layouts[form.layout].ranges)
        plan = form.package.plan_exchange(pattern, shards, options.key_heads)
        way = getattr(form.package, form.attend)
        return lambda q, k, v: way(q, k, v, plan, group=form.group)

    runs = {name: attend(form) for name, form in known.items()}

    @contextmanager
    def as_form(form: Form, start: Callable[..., Any] | None = None) -> Iterator[None]:
        exchange = exchange_of(form.package)
        start = start or exchange.start_all_to_all
        with turns(form.turns), mock.patch.object(exchange, "start_all_to_all", start):
            yield

    for name, form in known.items():
        with as_form(form):
            found = gradients(runs[name], mine[form.layout])
        parts = [layouts[form.layout].split(each, machine.rank, dim=2) for each in one]
        apart = [(a.float() - b.float()).abs().max() for a, b in zip(found, parts)]
        largest = torch.stack([*apart, *(each.float().abs().max() for each in one)])
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        shown = dict(zip(NAMES, largest[:4].tolist()))
        add({"part": "difference from one GPU", "way": name, **shown})
    add({"part": "largest value", "way": "one GPU", **dict(zip(NAMES, largest[4:].tolist()))})
    del one, found, parts
    taken: dict[str, list[Row]] = {}
    silence = {form.package: silent(exchange_of(form.package)) for form in known.values()}
    for turn in range(options.rounds):
        order = list(known.items())
        for name, form in order if turn % 2 == 0 else reversed(order):
            row: Row = {"part": "round", "round": turn, "way": name}
            with as_form(form):
                row |= times(options, machine, runs[name], mine[form.layout])
            if form.attend == "sharded_attention":
                with as_form(form, silence[form.package]):
                    without = times(options, machine, runs[name], mine[form.layout])
                row |= {f"{key[:-3]}_without_exchange_ms": ms for key, ms in without.items()}
            taken.setdefault(name, []).append(row)
            add(row)
        single = machine.alone(lambda: times(options, machine, whole, tensors, False))
        row = {"part": "round", "round": turn, "way": "one GPU", **single}
        taken.setdefault("one GPU", []).append(row)
        add(row)
    for name, rounds in taken.items():
        medians: Row = {
            key: statistics.median(row[key] for row in rounds) for key in rounds[0] if "_ms" in key
        }
        alone = statistics.median(row["total_ms"] for row in taken["one GPU"])
        medians["times_faster"] = alone / medians["total_ms"]
        add({"part": "median", "way": name, **medians})
    if machine.cuda:
        for name in [name for name, form in known.items() if form.attend == "sharded_attention"]:
            with as_form(known[name]):
                kernels = timeline(partial(gradients, runs[name], mine["balanced"]))
            everyone: list[Any] = [None] * machine.ranks
            dist.all_gather_object(everyone, kernels)
            add({"part": "kernels", "way": name, "kernels": everyone})


if __name__ == "__main__":
    main()
