"""Several GPUs against one: attention on shards of a long sequence, training and decoding.

    torchrun --nproc-per-node 2 -m benchmarks.parallel --output results.json
    torchrun --nproc-per-node 2 -m benchmarks.parallel --attention --output results.json

Five parts, each with a flag; all of them without any:

    --correctness    shards in bfloat16 against the whole sequence in float32 and in bfloat16
    --attention      forward and backward of one long sequence: one GPU against all of them, by the
                     exchange of what the bands reach, by an all-gather and by Ulysses
    --data-parallel  tokens per second and losses of a Llama of 1 B parameters with bands under
                     FSDP2, at the same global batch
    --tensor-parallel
                     time per token and cache of the same model by Transformers' `tp_plan="auto"`

    --losses         losses of 200 steps of a small Llama in bfloat16 by context parallelism, beside
                     those of one GPU with several splits into micro-batches

Results are written after every row; a part that fails is recorded and the next one runs. Times are
those of the slowest rank, medians over repetitions.
"""

from __future__ import annotations

import argparse
import gc
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from spattention import BandPattern, band_attention
from spattention.benchmarking.results import write_rows
from spattention.parallel import (
    Shards,
    exchange,
    gathered_attention,
    plan_exchange,
    sharded_attention,
    ulysses_attention,
)
from spattention.parallel.rank_calls import rank_plan

from .parallel_decoding import tensor_parallel
from .parallel_losses import losses
from .parallel_training import WAYS as TRAINING_WAYS
from .parallel_training import data_parallel
from .rank import Machine, Row

WAYS: dict[str, tuple[Callable[..., Any], str]] = {
    "ours, balanced": (sharded_attention, "balanced"),
    "ours, contiguous": (sharded_attention, "contiguous"),
    "all-gather, balanced": (gathered_attention, "balanced"),
    "Ulysses, contiguous": (ulysses_attention, "contiguous"),
}


def layout(name: str, length: int, ranks: int) -> Shards:
    return getattr(Shards, name)(length, ranks)


def draw(options: argparse.Namespace, length: int, device: torch.device) -> list[torch.Tensor]:
    """Query, key, value and the gradient of the output, of the whole sequence, on every rank."""
    random = torch.Generator(device).manual_seed(0)
    heads = (options.heads, options.key_heads, options.key_heads, options.heads)
    return [
        torch.randn(
            1, h, length, options.head_dim, generator=random, device=device, dtype=torch.bfloat16
        )
        for h in heads
    ]


def gradients(attend: Callable[..., Any], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and gradients of query, key and value."""
    *inputs, d_out = tensors
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out)]


def correctness(options: argparse.Namespace, machine: Machine) -> Iterator[Row]:
    """Errors of every way on the kernels' own terms: at most twice that of one GPU in the same
    dtype, and a rounding of the result."""
    length = min(options.length, options.check_length)
    pattern = BandPattern.shared_local(options.heads, length, widths="geometric")
    tensors = draw(options, length, machine.device)
    names = ("out", "d_query", "d_key", "d_value")
    one = gradients(lambda q, k, v: band_attention(q, k, v, pattern), tensors)
    exact = gradients(
        lambda q, k, v: band_attention(q, k, v, pattern), [each.float() for each in tensors]
    )
    for name, (attend, kind) in WAYS.items():
        shards = layout(kind, length, machine.ranks)
        plan = plan_exchange(pattern, shards, options.key_heads)
        mine = [shards.split(each, machine.rank, dim=2) for each in tensors]
        found = gradients(partial(attend, plan=plan), mine)
        row: Row = {"part": "correctness", "way": name, "length": length}
        for label, got, single, wanted in zip(names, found, one, exact):
            parts = [shards.split(each, machine.rank, dim=2).double() for each in (single, wanted)]
            error = (got.double() - parts[1]).abs().max()
            budget = 2 * (single.double() - wanted.double()).abs().max()
            budget += torch.finfo(torch.bfloat16).eps * wanted.double().abs().max()
            both = torch.stack([error, budget])
            dist.all_reduce(both, dist.ReduceOp.MAX)
            row[label] = {"error": both[0].item(), "budget": both[1].item()}
        row["ok"] = all(row[label]["error"] <= row[label]["budget"] for label in names)
        yield row
        if not row["ok"]:
            raise AssertionError(f"an error is above its budget: {row}")


def silent(module: ModuleType) -> Callable[..., Any]:
    """A `start_all_to_all` of this `exchange` module by which nothing travels. Random numbers
    arrive at once: a GPU multiplies zeros with less power, and so faster.
    """
    drawn: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def start(sent: torch.Tensor, received: torch.Tensor, *others: Any) -> Any:
        key = received.numel(), received.dtype
        if key not in drawn:
            drawn[key] = torch.randn_like(received)
        return module.Pending(sent, drawn[key], None)

    return start


def times(
    options: argparse.Namespace,
    machine: Machine,
    attend: Callable[..., Any],
    tensors: list[torch.Tensor],
    together: bool = True,
) -> Row:
    """Milliseconds of a forward pass, and of both passes."""
    *inputs, d_out = tensors
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]

    def forward() -> None:
        with torch.no_grad():
            attend(*inputs)

    def both() -> None:
        torch.autograd.grad(attend(*inputs), inputs, d_out)

    found = [machine.seconds(f, options.repetitions, together) for f in (forward, both)]
    return {"forward_ms": 1e3 * found[0], "total_ms": 1e3 * found[1]}


def attention(options: argparse.Namespace, machine: Machine) -> Iterator[Row]:
    """Times of one long sequence."""
    length, ranks = options.length, machine.ranks
    pattern = BandPattern.shared_local(options.heads, length, widths="geometric")
    tensors = draw(options, length, machine.device)

    base = machine.forget_peak()
    single = machine.alone(
        lambda: times(
            options, machine, lambda q, k, v: band_attention(q, k, v, pattern), tensors, False
        )
    )
    common = {"part": "attention", "length": length}
    yield {**common, "way": "one GPU", "ranks": 1, **single, "peak_gib": machine.peak(base)}
    for name, (attend, kind) in WAYS.items():
        shards = layout(kind, length, ranks)
        plan = plan_exchange(pattern, shards, options.key_heads)
        mine = [shards.split(each, machine.rank, dim=2) for each in tensors]
        run = partial(attend, plan=plan)
        base = machine.forget_peak()
        row: Row = {**common, "way": name, "ranks": ranks, **times(options, machine, run, mine)}
        row["peak_gib"] = machine.peak(base)
        row["times_faster"] = single["total_ms"] / row["total_ms"]
        row["pairs_of_busiest_rank"] = busiest(pattern, shards)
        if attend is sharded_attention:
            row |= exposed(options, machine, plan, mine, row, run)
        yield row


def exposed(
    options: argparse.Namespace,
    machine: Machine,
    plan: Any,
    mine: list[torch.Tensor],
    row: Row,
    run: Callable[..., Any],
) -> Row:
    """The share of communication that attention waits for."""
    with mock.patch.object(exchange, "start_all_to_all", silent(exchange)):
        without = times(options, machine, run, mine)
    _, key, value, _ = mine
    trip = exchange.Exchange(plan, rank_plan(plan, machine.rank), key, value, None)

    def there_and_back() -> None:
        tables = trip.finish(trip.start(key, value), key, value)
        trip.start_reverse(tables, key).wait()

    travel = 1e3 * machine.seconds(there_and_back, options.repetitions)
    fetched = [plan.fetched_keys(rank) for rank in range(plan.shards.ranks)]
    size = 2 * options.head_dim * key.element_size()
    return {
        "forward_without_exchange_ms": without["forward_ms"],
        "without_exchange_ms": without["total_ms"],
        "exchange_alone_ms": travel,
        "share_not_hidden": (row["total_ms"] - without["total_ms"]) / travel,
        "megabytes_fetched": [count * size / 1e6 for count in fetched],
        "keys_fetched_over_all": [
            count / options.key_heads / plan.shards.length for count in fetched
        ],
    }


def busiest(pattern: BandPattern, shards: Shards) -> float:
    """Pairs of the rank that has most, over all pairs."""

    def pairs(length: int) -> int:
        return sum(pattern.pairs(length))

    work = [sum(pairs(b) - pairs(a) for a, b in ranges) for ranges in shards.ranges]
    return max(work) / sum(work)


CURVES = ("one", "parallel", "other")  # of one GPU, context parallelism, one GPU's other kernels
PARTS = {
    "correctness": correctness,
    "attention": attention,
    "data_parallel": data_parallel,
    "tensor_parallel": tensor_parallel,
    "losses": losses,
}


def table(rows: list[Row]) -> str:
    """The main numbers as text."""
    lines = []
    for row in rows:
        values = [
            f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, int | float)
        ]
        lines.append(f"{row['part']:14} {row.get('way', ''):22} " + ", ".join(values))
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in PARTS:
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--length", type=int, default=131072, help="tokens of the long sequence")
    parser.add_argument("--check-length", type=int, default=8192, help="tokens of the check")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--key-heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--context", type=int, default=4096, help="tokens of a training row")
    parser.add_argument("--global-batch", type=int, default=8, help="training rows of a step")
    parser.add_argument("--micro-batch", type=int, default=4, help="training rows of a pass")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--turns", type=int, default=1, help="of data_parallel, tensor_parallel")
    parser.add_argument("--ways", nargs="*", choices=list(TRAINING_WAYS), help="of data_parallel")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--curve-steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the losses")
    parser.add_argument(
        "--curves", nargs="+", choices=CURVES, default=list(CURVES[:2]), help="of losses"
    )
    parser.add_argument("--prompt", type=int, default=32768, help="tokens before decoding")
    parser.add_argument("--decoding-rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--decoding-graphs", action="store_true", help="also by CUDA graphs")
    parser.add_argument("--commit", help="recorded where git cannot tell")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    machine = Machine(options.device)
    chosen = [name for name in PARTS if getattr(options, name)] or list(PARTS)
    rows: list[Row] = []
    failed = False
    for name in chosen:
        try:
            for row in PARTS[name](options, machine):
                rows.append(row)
                write(options, machine, rows)
        except Exception as error:  # the other parts still run
            failed = True
            rows.append({"part": name, "error": f"{type(error).__name__}: {error}"})
            write(options, machine, rows)
            traceback.print_exc()
        if machine.cuda:
            gc.collect()
            torch.cuda.empty_cache()
    dist.destroy_process_group()
    if failed:
        raise SystemExit(1)


def write(options: argparse.Namespace, machine: Machine, rows: list[Row]) -> None:
    """Write all rows, and print the last."""
    if machine.rank != 0:
        return
    settings = {k: v for k, v in vars(options).items() if k not in ("output", "commit")}
    what = f"{machine.ranks} processes against one"
    gpu = {}
    if machine.cuda:
        gpu = {"gpu": torch.cuda.get_device_name(), "triton": version("triton")}
    write_rows(options.output, what, settings, rows, commit=options.commit, environment=gpu)
    print(table(rows[-1:]), flush=True)


if __name__ == "__main__":
    main()
