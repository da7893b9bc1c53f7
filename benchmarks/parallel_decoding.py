"""Tensor-parallel decoding: one GPU against all of them, by Transformers' plans.

By plain calls, and with `--decoding-graphs` also by replays of a CUDA graph of one token: plain
calls of a small model wait for the host.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .parallel_training import llama
from .rank import Machine, Row

PROFILED = 3  # tokens whose kernels are added up
WARM_UPS = 2  # tokens before a graph is captured
ATTENTION = ("chunk_kernel", "combine_kernel", "append_kernel")  # and of its cache


def tensor_parallel(options: argparse.Namespace, machine: Machine) -> Iterator[Row]:
    """Time per new token after a prompt, and the memory of each rank's weights and cache."""
    with tempfile.TemporaryDirectory() as folder:
        where = [folder]
        dist.broadcast_object_list(where, src=0)
        path = Path(where[0])

        def save() -> None:
            length = options.prompt + 2 * options.new_tokens + 1 + PROFILED + WARM_UPS
            model, _ = llama(options, length, machine.device)
            model.to(torch.bfloat16).save_pretrained(path)

        machine.alone(save)
        gc.collect()
        turns = itertools.product(range(options.turns), options.decoding_rows)
        for turn, rows in turns:
            common = {"part": "tensor-parallel", "prompt": options.prompt, "rows": rows}
            common["turn"] = turn
            single = machine.alone(partial(decode, options, machine, path, None, rows))
            yield {**common, "way": "one GPU", "ranks": 1, **single}
            gc.collect()
            for way in ("consecutive heads", "dealt heads"):
                mine = decode(options, machine, path, "auto", rows, deal=way == "dealt heads")
                found: list[Row] = [{}] * machine.ranks
                dist.all_gather_object(found, mine)
                every: Row = {name: max(each[name] for each in found) for name in mine}
                every["times_faster"] = single["token_ms"] / every["token_ms"]
                if options.decoding_graphs:
                    every["times_faster_by_graphs"] = single["graph_ms"] / every["graph_ms"]
                for name in mine:
                    every[f"{name}_by_rank"] = [each[name] for each in found]
                yield {**common, "way": way, "ranks": machine.ranks, **every}
                gc.collect()


def decode(
    options: argparse.Namespace,
    machine: Machine,
    path: Path,
    tp_plan: str | None,
    rows: int,
    *,
    deal: bool = False,
) -> dict[str, Any]:
    """Times and sizes of this rank, whose heads are consecutive, or dealt for equal work."""
    from transformers import AutoModelForCausalLM

    from spattention import hf

    hf.register()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, tp_plan=tp_plan)
    model = model.eval() if tp_plan else model.eval().to(machine.device)
    if deal:
        hf.deal(model, machine.ranks)
    random = torch.Generator().manual_seed(0)
    prompt = torch.randint(32768, (rows, options.prompt), generator=random).to(machine.device)
    cache = hf.BandCache(model.config)
    seconds = []

    def step() -> None:
        nonlocal prompt
        logits = model(prompt, past_key_values=cache, logits_to_keep=1).logits
        prompt = logits[:, -1:].argmax(-1)

    with torch.no_grad():
        for _ in range(options.new_tokens + 1):
            machine.wait()
            start = time.perf_counter()
            step()
            machine.wait()
            seconds.append(time.perf_counter() - start)
        kernels = times_of_kernels(machine, step)
        graph = {}
        if options.decoding_graphs:
            graph["graph_ms"] = time_of_replays(options, machine, model, cache, prompt)
    local = (getattr(each, "to_local", lambda each=each: each)() for each in model.parameters())
    return {
        "prompt_s": seconds[0],
        "token_ms": 1e3 * statistics.median(seconds[3:] or seconds[1:]),
        "tokens_ms": [1e3 * each for each in seconds[1:]],
        **graph,
        **kernels,
        "cache_gib": cache.nbytes / 2**30,
        "weights_gib": sum(each.numel() * each.element_size() for each in local) / 2**30,
    }


def time_of_replays(
    options: argparse.Namespace, machine: Machine, model: Any, cache: Any, token: torch.Tensor
) -> float:
    """Median milliseconds of a token by a CUDA graph, as a server decodes."""
    position = torch.full_like(token, int(cache.get_seq_length()))
    side = torch.cuda.Stream()

    def step() -> None:
        given = {"past_key_values": cache, "position_ids": position, "logits_to_keep": 1}
        logits = model(token, **given).logits
        token.copy_(logits[:, -1:].argmax(-1))
        position.add_(1)

    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            step()
    machine.wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        step()
    seconds = []
    for _ in range(options.new_tokens):
        machine.wait()
        start = time.perf_counter()
        graph.replay()
        machine.wait()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[3:] or seconds)


def times_of_kernels(machine: Machine, step: Callable[[], None]) -> Row:
    """Milliseconds of a token's kernels: those of attention, those of all others but NCCL's, whose
    time is that of waiting too. 0 on the CPU."""
    found = {"attention_ms": 0.0, "others_ms": 0.0}
    if not machine.cuda:
        return found
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(PROFILED):
            step()
        machine.wait()
    for event in recorded.profiler.kineto_results.events():
        name = event.name().lower()
        if event.device_type() == torch.autograd.DeviceType.CUDA and "nccl" not in name:
            kind = "attention_ms" if name.startswith(ATTENTION) else "others_ms"
            found[kind] += event.duration_ns() / 1e6 / PROFILED
    return found
