"""Losses in bfloat16 by context parallelism, beside those of one GPU."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from .parallel_training import drawn_tokens, llama
from .rank import Machine, Row

ROWS = 4  # of a step
MICRO_BATCHES = (ROWS, ROWS // 2)


def losses(options: argparse.Namespace, machine: Machine) -> Iterator[Row]:
    """Distances of loss curves from one GPU's: one GPU's with another split into micro-batches, and
    that of all ranks by context parallelism."""
    common = {"part": "losses", "steps": options.curve_steps, "context": options.context}
    curves = []
    for micro_batch in MICRO_BATCHES:
        curve = machine.alone(partial(train, options, machine, micro_batch, None))
        curves.append(curve)
        way = f"one GPU, micro-batches of {micro_batch}"
        yield {**common, "way": way, "ranks": 1, **distances(curve, curves[0]), "losses": curve}
    mesh = dist.init_device_mesh(machine.device.type, (machine.ranks,))
    curve = train(options, machine, ROWS, mesh)
    row = {**common, "way": "context parallelism", "ranks": machine.ranks}
    row |= distances(curve, curves[0])
    row["ok"] = row["mean_distance"] <= distances(curves[1], curves[0])["mean_distance"]
    yield {**row, "losses": curve}


def distances(curve: list[float], other: list[float]) -> Row:
    apart = [abs(a - b) for a, b in zip(curve, other, strict=True)]
    return {
        "first_loss": curve[0],
        "last_loss": curve[-1],
        "mean_distance": sum(apart) / len(apart),
        "largest_distance": max(apart),
    }


def train(
    options: argparse.Namespace, machine: Machine, micro_batch: int, mesh: Any
) -> list[float]:
    """Losses of a small Llama; all ranks of a mesh have the same rows."""
    from spattention import hf

    small = {"hidden": min(options.hidden, 512), "layers": min(options.layers, 4)}
    given = argparse.Namespace(**{**vars(options), **small})
    model, _ = llama(given, options.context, machine.device)
    if mesh is not None:
        hf.context_parallel(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for step in range(options.curve_steps):
        tokens = drawn_tokens(step, ROWS, options.context).to(machine.device)
        parts = tokens.split(micro_batch)
        total = torch.zeros((), device=machine.device)
        for part in parts:
            with torch.autocast(machine.device.type, torch.bfloat16):
                loss = model(input_ids=part, labels=part, use_cache=False).loss / len(parts)
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
