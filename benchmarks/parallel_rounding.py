"""Where context parallelism in bfloat16 departs from one GPU: rounding in one step of training.

    torchrun --nproc-per-node 2 -m benchmarks.parallel_rounding --output results.json

Another split into micro-batches changes the sums over rows alone: every row passes forward with the
same bits. Shards sum attention in another order, which changes the last bit of a few of its
numbers. Two parts:

    operator    root mean square errors of output and gradients against float64, over those of one
                call for all keys in bfloat16, and the share of numbers that differ from its own
    weights     distance of weights' gradients from those of one GPU, relative to them, and of the
                loss: for the splits of a step, for other kernels of one GPU, and for context
                parallelism, whose attention is replaced by that of one GPU in the forward pass, in
                the backward pass, or in both with some numbers of the first layer's output off by
                one in the last bit
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from spattention import BandPattern, band_attention, hf
from spattention.benchmarking.results import write_rows
from spattention.parallel import Plan, Shards, plan_exchange, sharded_attention

from .parallel import draw, gradients
from .parallel_losses import OTHER, SPLITS, other_kernels
from .parallel_training import drawn_tokens, llama
from .rank import Machine, Row

NAMES = ("out", "d_query", "d_key", "d_value")
WEIGHTS = ("q_proj", "k_proj", "v_proj", "o_proj", "mlp", "embed", "lm_head")


class Way(NamedTuple):
    """Attention of a context-parallel model: whether its forward and its backward pass are those
    of one GPU, and how many outputs of the first layer are then moved by one in the last bit."""

    whole_forward: bool = False
    whole_backward: bool = False
    moved: int = 0


WAYS = {
    "context parallelism": Way(),
    "forward of one GPU": Way(whole_forward=True),
    "backward of one GPU": Way(whole_backward=True),
    "both of one GPU": Way(True, True),
    "both, 1 number moved": Way(True, True, 1),
    "both, 20 numbers moved": Way(True, True, 20),
}


def operator(options: argparse.Namespace, machine: Machine) -> Row:
    """Errors of one call with the keys of all ranks."""
    length = options.length
    pattern = BandPattern.shared_local(options.heads, length, widths="geometric")
    tensors = draw(options, length, machine.device)
    exact, one = (
        gradients(lambda q, k, v: band_attention(q, k, v, pattern), given)
        for given in ([each.double() for each in tensors], tensors)
    )
    shards = Shards.balanced(length, machine.ranks)
    plan = plan_exchange(pattern, shards, options.key_heads)
    mine = [shards.split(each, machine.rank, dim=2) for each in tensors]
    found = gradients(lambda q, k, v: sharded_attention(q, k, v, plan), mine)
    row: Row = {"part": "operator", "length": length}
    for name, part, single, wanted in zip(NAMES, found, one, exact):
        got = joined(part, shards)
        errors = [(each.double() - wanted).square().mean().sqrt().item() for each in (got, single)]
        row[name] = {
            "error_of_one": errors[1] / wanted.square().mean().sqrt().item(),
            "error_over_that_of_one": errors[0] / errors[1],
            "share_that_differs": (got != single).double().mean().item(),
        }
    return row


def joined(part: torch.Tensor, shards: Shards) -> torch.Tensor:
    """The whole of a tensor `[B, H, tokens, D]` of which each rank has as much."""
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(shards.ranks)]
    dist.all_gather(parts, part)
    return shards.join(parts, dim=2)


def attended(attend: Callable[..., Any], inputs: list[torch.Tensor], how: Any) -> torch.Tensor:
    """Output of an operator on query, key and value."""
    found: torch.Tensor = attend(*inputs, how)
    return found


class _Attention(torch.autograd.Function):
    """Attention on a shard, of which passes may be one GPU's."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, plan: Plan, way: Way) -> torch.Tensor:
        shards, rank = plan.shards, dist.get_rank()
        own = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        whole = [joined(tensor.detach(), shards).requires_grad_() for tensor in own]
        with torch.enable_grad():
            by_shards = attended(sharded_attention, own, plan)
            by_one = attended(band_attention, whole, plan.pattern)
        ctx.shards = shards
        ctx.recorded = (by_one, whole) if way.whole_backward else (by_shards, own)
        out = shards.split(by_one, rank, dim=2) if way.whole_forward else by_shards
        out = out.detach().clone()
        if way.moved and rank == 0:
            bits = out.view(torch.int16).view(-1)
            bits[:: bits.numel() // way.moved][: way.moved] += 1
        return out

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        out, inputs = ctx.recorded
        if out.shape == d_out.shape:
            return *torch.autograd.grad(out, inputs, d_out), None, None
        found = torch.autograd.grad(out, inputs, joined(d_out, ctx.shards))
        parts = (ctx.shards.split(each, dist.get_rank(), dim=2) for each in found)
        return *parts, None, None


def attention_of(way: Way) -> Callable[..., torch.Tensor]:
    """A `sharded_attention` for the layers of one forward pass."""
    layers = itertools.count()

    def attend(query: Any, key: Any, value: Any, plan: Plan, **others: Any) -> torch.Tensor:
        is_first = next(layers) == 0
        chosen = way if is_first else way._replace(moved=0)
        found: torch.Tensor = _Attention.apply(query, key, value, plan, chosen)
        return found

    return attend


def step(
    model: Any, tokens: torch.Tensor, split: Sequence[int], ranks: int = 1
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step; all `ranks` have the same rows."""
    total = 0.0
    for part in tokens.split(list(split)):
        with torch.autocast(tokens.device.type, torch.bfloat16):
            loss = model(input_ids=part, labels=part, use_cache=False).loss
        loss = loss * len(part) / len(tokens)
        loss.backward()
        total += loss.item()
    found = {}
    for name, parameter in model.named_parameters():
        if ranks > 1:
            dist.all_reduce(parameter.grad)
        found[name] = parameter.grad / ranks
    model.zero_grad()
    return total, found


def distances(
    one: tuple[float, dict[str, torch.Tensor]], other: tuple[float, dict[str, torch.Tensor]]
) -> dict[str, float]:
    """Distance of the losses, and of the gradients of each kind of weights, relative to them."""
    found = {"loss": abs(one[0] - other[0])}
    for kind in WEIGHTS:
        squares = [
            ((mine - other[1][name]).double().square().sum(), mine.double().square().sum())
            for name, mine in one[1].items()
            if kind in name
        ]
        apart, size = (torch.stack(each).sum() for each in zip(*squares))
        found[kind] = (apart / size).sqrt().item()
    return found


def weights(options: argparse.Namespace, machine: Machine) -> list[Row]:
    """Mean distances over seeds and splits."""
    module = import_module("spattention.hf.context_parallel")
    mesh = dist.init_device_mesh(machine.device.type, (machine.ranks,))
    found: dict[str, list[dict[str, float]]] = {"one GPU, splits": [], OTHER: []}
    for seed in options.seeds:
        model, _ = llama(options, options.context, machine.device, seed)
        tokens = drawn_tokens(seed, sum(SPLITS[0]), options.context).to(machine.device)
        single = [step(model, tokens, split) for split in SPLITS]
        pairs = itertools.combinations(single, 2)
        found["one GPU, splits"] += itertools.starmap(distances, pairs)
        with other_kernels(machine.device):
            other = step(model, tokens, SPLITS[0])
        found[OTHER] += [distances(each, other) for each in single]
        hf.context_parallel(model, mesh)
        for name, way in WAYS.items():
            with mock.patch.object(module, "sharded_attention", attention_of(way)):
                shared = step(model, tokens, SPLITS[0], machine.ranks)
            found.setdefault(name, []).extend(distances(each, shared) for each in single)
    return [
        {
            "part": "weights",
            "way": name,
            **{kind: statistics.fmean(row[kind] for row in rows) for kind in rows[0]},
        }
        for name, rows in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--length", type=int, default=2048, help="tokens of the operator's part")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--key-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024, help="tokens of a training row")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--commit", help="recorded where git cannot tell")
    options = parser.parse_args()
    machine = Machine(options.device)
    rows = [operator(options, machine), *weights(options, machine)]
    if machine.rank == 0:
        gpu = {}
        if machine.cuda:
            gpu = {"gpu": torch.cuda.get_device_name(), "triton": version("triton")}
        settings = {k: v for k, v in vars(options).items() if k not in ("output", "commit")}
        what = "rounding of context parallelism in bfloat16, one step"
        write_rows(options.output, what, settings, rows, commit=options.commit, environment=gpu)
        for row in rows:
            print(row)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
