"""Data-parallel training of a Llama with bands under FSDP2: one GPU against all of them."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from spattention import BandPattern

from .rank import Machine, Row

HEAD_DIM = 64
PEAK_FLOPS = 700e12  # per GPU, as in docs/training.md
STATE_BYTES = 16  # per parameter, as there


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


def llama(
    options: argparse.Namespace, length: int, device: torch.device
) -> tuple[Any, BandPattern]:
    """A model with random weights, and its bands."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from spattention import hf

    config = LlamaConfig(
        vocab_size=32768,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // HEAD_DIM,
        num_key_value_heads=max(2, options.hidden // (4 * HEAD_DIM)),
        max_position_embeddings=length,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    bands = BandPattern.shared_local(config.num_attention_heads, length, widths="geometric")
    return hf.apply(model, bands), bands


def train(options: argparse.Namespace, machine: Machine, ranks: list[int], group: Any) -> Row:
    """A few steps under FSDP2 on some ranks, called on those alone."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    length = options.context
    model, bands = llama(options, length, machine.device)
    parameters = sum(each.numel() for each in model.parameters())
    pairs = sum(bands.pairs(length)) * options.layers / length
    work = 6 * parameters + 14 * HEAD_DIM * pairs  # per token, as in docs/training.md
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
        "mfu": per_s * work / (len(ranks) * PEAK_FLOPS),
        "state_gib": STATE_BYTES * parameters / len(ranks) / 2**30,
        "losses": losses,
        "peak_gib": peak,
    }
