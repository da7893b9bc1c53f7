"""Data-parallel training with bands under FSDP2 and DDP: one GPU against all of them."""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from spattention import BandPattern
from spattention.models import parameters_of

from .rank import Machine, Row

HEAD_DIM = 64
PEAK_FLOPS = 700e12  # per GPU, as in docs/training.md
STATE_BYTES = 16  # per parameter, as there
VOCABULARY = 32768


class Way(NamedTuple):
    """A model, how ranks share it, and the group in which they do.

    Attributes:
        make: makes the model and its bands.
        spread: gives it to the ranks of a group.
        group: makes the group of all ranks; None for the default one.
    """

    make: Callable[..., Any]
    spread: Callable[..., Any]
    group: Callable[[], Any] | None = None


def data_parallel(options: argparse.Namespace, machine: Machine) -> Iterator[Row]:
    """Steps of one rank and of all, from the same weights over the same global batches, all ways in
    turns; then the medians over the turns."""
    alone, every = dist.new_group([0]), list(range(machine.ranks))
    ways = options.ways or list(WAYS)
    groups = {way: make() if (make := WAYS[way].group) else None for way in ways}
    found: dict[tuple[str, int], list[Row]] = {}
    for turn in range(options.turns):
        singles: dict[str, Row] = {}
        for way in ways if turn % 2 == 0 else ways[::-1]:
            common = {"part": "data-parallel", "way": way, "turn": turn}
            single = next(each for each in ways if _is_one_alone(each, way))
            if single not in singles:
                run = partial(train, options, machine, single, [0], alone)
                singles[single] = machine.alone(run)
                yield {**common, "way": single, "ranks": 1, **singles[single]}
            row = train(options, machine, way, every, groups[way])
            row["largest_loss_difference"] = max(
                abs(a - b) for a, b in zip(row["losses"], singles[single]["losses"])
            )
            yield {**common, "ranks": machine.ranks, **row}
            for ranks, each in ((1, singles[single]), (machine.ranks, row)):
                found.setdefault((way, ranks), []).append(each)
    for way in ways:
        one, more = (
            {
                name: statistics.median(row[name] for row in found[way, ranks])
                for name in ("step_s", "tokens_per_s", "mfu")
            }
            for ranks in (1, machine.ranks)
        )
        common = {"part": "data-parallel median", "way": way, "ranks": machine.ranks}
        yield {
            **common,
            **more,
            "one_gpu_step_s": one["step_s"],
            "one_gpu_tokens_per_s": one["tokens_per_s"],
            "one_gpu_mfu": one["mfu"],
            "scaling_efficiency": more["tokens_per_s"] / one["tokens_per_s"] / machine.ranks,
        }


def _is_one_alone(way: str, other: str) -> bool:
    """True if two ways are the same on one rank, where nothing is exchanged."""
    a, b = WAYS[way], WAYS[other]
    return a.make is b.make and (a.spread is sharded) == (b.spread is sharded)


def llama(
    options: argparse.Namespace, length: int, device: torch.device, seed: int = 0
) -> tuple[Any, BandPattern]:
    """A model with random weights, and its bands."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from spattention import hf

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // HEAD_DIM,
        num_key_value_heads=max(2, options.hidden // (4 * HEAD_DIM)),
        max_position_embeddings=length,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    bands = BandPattern.shared_local(config.num_attention_heads, length, widths="geometric")
    return hf.apply(model, bands), bands


def olmoe(
    options: argparse.Namespace, length: int, device: torch.device
) -> tuple[Any, BandPattern]:
    """OLMoE 0.25B-1.75B, or the tiny one on the CPU, with bands."""
    from spattention.models import build, preset

    name = "olmoe-0.25b-1.75b" if device.type == "cuda" else "olmoe-tiny"
    chosen = preset(name, context=length)
    torch.manual_seed(0)
    with torch.device(device):
        return build(chosen), chosen.pattern


def drawn_tokens(step: int, rows: int, length: int) -> torch.Tensor:
    """Random tokens; runs of one token make the loss fall, so that a wrong gradient would show."""
    random = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (rows, length), generator=random)
    return tokens // 4096 * 4096 + torch.arange(length) % 64


def sharded(model: Any, machine: Machine, group: Any) -> Any:
    """A model under FSDP2, with products in bfloat16."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    group = group or dist.group.WORLD
    mesh = DeviceMesh.from_group(group, machine.device.type)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def replicated(
    model: Any, machine: Machine, group: Any, views: bool = True, bucket: int | None = None
) -> Any:
    """A model under DDP; the caller's autocast gives products in bfloat16.

    Args:
        model: on this rank's device.
        machine: this rank's.
        group: ranks that train together; None for all.
        views: whether gradients lie in the buckets, as in `spattention train`, or are copied.
        bucket: size of a bucket in MB; None for PyTorch's own.
    """
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(
        model, process_group=group, gradient_as_bucket_view=views, bucket_cap_mb=bucket
    )


def exchanging(blocks: int | None = None, is_urgent: bool = False) -> Any:
    """A group of all ranks whose NCCL kernels have at most so many blocks, or come before others
    that wait for a multiprocessor."""
    if dist.get_backend() != "nccl":
        return None
    settings = dist.ProcessGroupNCCL.Options(is_high_priority_stream=is_urgent)
    if blocks is not None:
        settings.config.max_ctas = blocks
    return dist.new_group(pg_options=settings)


WAYS = {
    "Llama, FSDP2": Way(llama, sharded),
    "OLMoE, FSDP2": Way(olmoe, sharded),
    "Llama, DDP": Way(llama, replicated),
    "OLMoE, DDP": Way(olmoe, replicated),
    "Llama, DDP, copied gradients": Way(llama, partial(replicated, views=False)),
    "Llama, DDP, buckets of 100 MB": Way(llama, partial(replicated, bucket=100)),
    "Llama, DDP, 8 blocks": Way(llama, replicated, partial(exchanging, blocks=8)),
    "Llama, DDP, urgent": Way(llama, replicated, partial(exchanging, is_urgent=True)),
}


def train(
    options: argparse.Namespace, machine: Machine, way: str, ranks: list[int], group: Any
) -> Row:
    """A few steps on some ranks, called on those alone."""
    length, (make, spread, _) = options.context, WAYS[way]
    gc.collect()  # models of an earlier run, which are cycles
    if machine.cuda:
        torch.cuda.empty_cache()
    before = allocated(machine)
    model, bands = make(options, length, machine.device)
    parameters, config = sum(each.numel() for each in model.parameters()), model.config
    head_dim = config.hidden_size // config.num_attention_heads
    pairs = sum(bands.pairs(length)) * config.num_hidden_layers / length
    work = 6 * parameters_of(model).active + 14 * head_dim * pairs  # per token
    vocabulary = config.vocab_size
    model = spread(model, machine, group)
    in_half = torch.autocast(machine.device.type, torch.bfloat16, enabled=spread is not sharded)
    # As `spattention train`
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rows_here = options.global_batch // len(ranks)
    passes = range(0, rows_here, options.micro_batch)
    losses, seconds = [], []
    if machine.cuda:
        torch.cuda.reset_peak_memory_stats()
    for step in range(options.steps):
        tokens = drawn_tokens(step, options.global_batch, length) % vocabulary
        first = machine.rank * rows_here
        machine.wait()
        start = time.perf_counter()
        total = torch.zeros((), device=machine.device)
        for row in passes:
            part = tokens[first + row : first + row + options.micro_batch].to(machine.device)
            is_last = row == passes[-1]
            if spread is not sharded:
                model.require_backward_grad_sync = is_last
            with in_half:
                loss = model(input_ids=part, labels=part, use_cache=False).loss / len(passes)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step == options.steps - 1:
            state = allocated(machine) - before
        optimizer.zero_grad()
        if len(ranks) > 1:
            dist.all_reduce(total)
        losses.append(total.item() / len(ranks))
        seconds.append(time.perf_counter() - start)
    shards = len(ranks) if spread is sharded else 1
    median = statistics.median(seconds[2:] or seconds)
    per_s = options.global_batch * length / median
    peak = torch.cuda.max_memory_allocated() / 2**30 if machine.cuda else 0.0
    return {
        "parameters": parameters,
        "context": length,
        "global_batch": options.global_batch,
        "step_s": median,
        "tokens_per_s": per_s,
        "mfu": per_s * work / (len(ranks) * PEAK_FLOPS),
        "state_gib": state,
        "state_by_formula_gib": STATE_BYTES * parameters / shards / 2**30,
        "losses": losses,
        "peak_gib": peak,
    }


def allocated(machine: Machine) -> float:
    """GiB of this rank's tensors on its GPU."""
    return torch.cuda.memory_allocated() / 2**30 if machine.cuda else 0.0
