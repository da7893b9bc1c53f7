"""Several GPUs against one: attention on shards of a long sequence, and data-parallel training.

    torchrun --nproc-per-node 2 -m benchmarks.parallel --output results.json
    torchrun --nproc-per-node 2 -m benchmarks.parallel --attention --output results.json

Three parts, each with a flag; all of them without any:

    --correctness    shards in bfloat16 against the whole sequence in float32 and in bfloat16
    --attention      forward and backward of one long sequence: one GPU against all of them, by the
                     exchange of what the bands reach, by an all-gather and by Ulysses
    --data-parallel  tokens per second and losses of a Llama of 1 B parameters with bands under
                     FSDP2, at the same global batch

Results are written after every part; a part that fails is recorded and the next one runs. Times are
those of the slowest rank, medians over repetitions.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
from spattention.parallel.work import rank_plan

Row = dict[str, Any]
IN_A_ROW = 3  # runs of one measurement
WAYS = {
    "ours, balanced": (sharded_attention, "balanced"),
    "ours, contiguous": (sharded_attention, "contiguous"),
    "all-gather, balanced": (gathered_attention, "balanced"),
    "Ulysses, contiguous": (ulysses_attention, "contiguous"),
}


class Machine:
    """This process's device, and how it measures."""

    def __init__(self, device: str) -> None:
        self.rank, self.ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.cuda = device == "cuda"
        if self.cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        self.device = torch.device(device, torch.cuda.current_device() if self.cuda else None)
        dist.init_process_group("nccl" if self.cuda else "gloo", timeout=timedelta(seconds=120))

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], repetitions: int, together: bool = True) -> float:
        """Median time of a run, of which a few follow one another without a pause, as layers do;
        of the slowest rank if all run it together."""
        found = []
        for repetition in range(repetitions + 2):
            self.wait()
            if together:
                dist.barrier()
            start = time.perf_counter()
            for _ in range(IN_A_ROW):
                run()
            self.wait()
            mean = (time.perf_counter() - start) / IN_A_ROW
            took = torch.tensor(mean, device=self.device)
            if together:
                dist.all_reduce(took, dist.ReduceOp.MAX)
            if repetition >= 2:
                found.append(took.item())
        return statistics.median(found)

    def forget_peak(self) -> float:
        """Start to watch memory; GiB that are in use now."""
        if not self.cuda:
            return 0.0
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30

    def peak(self, base: float) -> float:
        """Largest memory beyond `base` since then, in GiB, of the rank that needed most."""
        most = torch.cuda.max_memory_allocated() / 2**30 - base if self.cuda else 0.0
        held = torch.tensor(most, device=self.device)
        dist.all_reduce(held, dist.ReduceOp.MAX)
        return held.item()

    def alone(self, run: Callable[[], Any]) -> Any:
        """The result of a run on rank 0, on every rank, while the others wait; its error too."""
        found: list[Any] = [None, None]
        if self.rank == 0:
            try:
                found[0] = run()
            except Exception as error:  # raised on all ranks, none of which may wait for more
                traceback.print_exc()
                found[1] = f"{type(error).__name__}: {error}"
        dist.broadcast_object_list(found, src=0, device=self.device if self.cuda else None)
        if found[1]:
            raise RuntimeError(found[1])
        return found[0]


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


def correctness(options: argparse.Namespace, machine: Machine) -> list[Row]:
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
    rows = []
    for name, (attend, kind) in WAYS.items():
        shards = layout(kind, length, machine.ranks)
        plan = plan_exchange(pattern, shards, options.key_heads)
        mine = [shards.split(each, machine.rank, dim=2) for each in tensors]
        found = gradients(lambda q, k, v, a=attend, p=plan: a(q, k, v, p), mine)
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
        rows.append(row)
    if not all(row["ok"] for row in rows):
        raise AssertionError(f"an error is above its budget: {rows}")
    return rows


@contextmanager
def without_exchange() -> Any:
    """Nothing travels while this lasts: the time of everything else."""
    stock = exchange.start_all_to_all

    def nothing(sent: torch.Tensor, received: torch.Tensor, *others: Any) -> exchange.Pending:
        return exchange.Pending(sent, received.zero_(), None)

    exchange.start_all_to_all = nothing
    try:
        yield
    finally:
        exchange.start_all_to_all = stock


def attention(options: argparse.Namespace, machine: Machine) -> list[Row]:
    """Times of one long sequence."""
    length, ranks = options.length, machine.ranks
    pattern = BandPattern.shared_local(options.heads, length, widths="geometric")
    tensors = draw(options, length, machine.device)

    def times(attend: Callable[..., Any], tensors: list[torch.Tensor], together: bool) -> Row:
        *inputs, d_out = tensors
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]

        def forward() -> None:
            with torch.no_grad():
                attend(*inputs)

        def both() -> None:
            torch.autograd.grad(attend(*inputs), inputs, d_out)

        found = [machine.seconds(f, options.repetitions, together) for f in (forward, both)]
        return {"forward_ms": 1e3 * found[0], "total_ms": 1e3 * found[1]}

    base = machine.forget_peak()
    single = machine.alone(
        lambda: times(lambda q, k, v: band_attention(q, k, v, pattern), tensors, False)
    )
    common = {"part": "attention", "length": length}
    rows = [{**common, "way": "one GPU", "ranks": 1, **single, "peak_gib": machine.peak(base)}]
    for name, (attend, kind) in WAYS.items():
        shards = layout(kind, length, ranks)
        plan = plan_exchange(pattern, shards, options.key_heads)
        mine = [shards.split(each, machine.rank, dim=2) for each in tensors]

        def run(q, k, v, a=attend, p=plan):
            return a(q, k, v, p)

        base = machine.forget_peak()
        row: Row = {**common, "way": name, "ranks": ranks, **times(run, mine, True)}
        row["peak_gib"] = machine.peak(base)
        row["times_faster"] = single["total_ms"] / row["total_ms"]
        row["pairs_of_busiest_rank"] = busiest(pattern, shards)
        if attend is sharded_attention:
            row |= exposed(options, machine, plan, mine, row, times, run)
        rows.append(row)
        del mine
    return rows


def exposed(
    options: argparse.Namespace,
    machine: Machine,
    plan: Any,
    mine: list[torch.Tensor],
    row: Row,
    times: Callable[..., Row],
    run: Callable[..., Any],
) -> Row:
    """The share of communication that attention waits for."""
    with without_exchange():
        silent = times(run, mine, True)
    _, key, value, _ = mine
    trip = exchange.Exchange(plan, rank_plan(plan, machine.rank), key, value, None)

    def there_and_back() -> None:
        tables = trip.finish(trip.start(key, value), key, value)
        trip.start_reverse(tables, key).wait()

    travel = 1e3 * machine.seconds(there_and_back, options.repetitions)
    fetched = [plan.fetched_keys(rank) for rank in range(plan.shards.ranks)]
    size = 2 * options.head_dim * key.element_size()
    return {
        "without_exchange_ms": silent["total_ms"],
        "exchange_alone_ms": travel,
        "share_not_hidden": (row["total_ms"] - silent["total_ms"]) / travel,
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


def data_parallel(options: argparse.Namespace, machine: Machine) -> list[Row]:
    """Steps of one rank and of all, from the same weights over the same global batches."""
    group = dist.new_group([0])
    rows = []
    single = machine.alone(lambda: train(options, machine, [0], group))
    rows.append({"part": "data-parallel", "ranks": 1, **single})
    every = list(range(machine.ranks))
    row = {"part": "data-parallel", "ranks": machine.ranks, **train(options, machine, every, None)}
    row["scaling_efficiency"] = row["tokens_per_s"] / single["tokens_per_s"] / machine.ranks
    row["largest_loss_difference"] = max(
        abs(a - b) for a, b in zip(row["losses"], single["losses"])
    )
    rows.append(row)
    return rows


def train(options: argparse.Namespace, machine: Machine, ranks: list[int], group: Any) -> Row:
    """A few steps under FSDP2 on some ranks, called on those alone."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    from spattention import hf

    length = options.context
    config = LlamaConfig(
        vocab_size=32768,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(1, options.hidden // 256),
        max_position_embeddings=length,
    )
    torch.manual_seed(0)
    with torch.device(machine.device):
        model = LlamaForCausalLM(config)
    bands = BandPattern.shared_local(config.num_attention_heads, length, widths="geometric")
    hf.apply(model, bands)
    parameters = sum(each.numel() for each in model.parameters())
    kind = machine.device.type
    mesh = DeviceMesh.from_group(group or dist.group.WORLD, kind)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    rows_here = options.global_batch // len(ranks)
    passes = range(0, rows_here, options.micro_batch)
    losses, seconds = [], []
    if machine.cuda:
        torch.cuda.reset_peak_memory_stats()
    for step in range(options.steps):
        random = torch.Generator().manual_seed(step)
        tokens = torch.randint(32768, (options.global_batch, length), generator=random)
        # Runs of one token make the loss fall, so that a wrong gradient would show.
        tokens = tokens // 4096 * 4096 + torch.arange(length) % 64
        first = machine.rank * rows_here
        machine.wait()
        start = time.perf_counter()
        total = torch.zeros((), device=machine.device)
        for row in passes:
            part = tokens[first + row : first + row + options.micro_batch].to(machine.device)
            loss = model(input_ids=part, labels=part, use_cache=False).loss / len(passes)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if len(ranks) > 1:
            dist.all_reduce(total)
        losses.append(total.item() / len(ranks))
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[2:] or seconds)
    per_s = options.global_batch * length / median
    peak = torch.cuda.max_memory_allocated() / 2**30 if machine.cuda else 0.0
    return {
        "parameters": parameters,
        "context": length,
        "global_batch": options.global_batch,
        "step_s": median,
        "tokens_per_s": per_s,
        "losses": losses,
        "peak_gib": peak,
    }


PARTS = {"correctness": correctness, "attention": attention, "data_parallel": data_parallel}


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
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
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
            found = PARTS[name](options, machine)
        except Exception as error:  # the other parts still run
            failed = True
            found = [{"part": name, "error": f"{type(error).__name__}: {error}"}]
            traceback.print_exc()
        if machine.cuda:
            torch.cuda.empty_cache()
        rows += found
        if machine.rank == 0:
            settings = {k: v for k, v in vars(options).items() if k not in ("output", "commit")}
            what = f"{machine.ranks} processes against one"
            gpu = {}
            if machine.cuda:
                gpu = {"gpu": torch.cuda.get_device_name(), "triton": version("triton")}
            write_rows(options.output, what, settings, rows, commit=options.commit, environment=gpu)
            print(table(found), flush=True)
    dist.destroy_process_group()
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
