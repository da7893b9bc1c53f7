"""Throughput of full training steps, dense attention against bands, in one model.

One model with one optimizer serves both sides: attention has no parameters, and the sides take
turns, so that a drift of the clock meets all of them. A step is what `spattention train` does:
passes with the recipe's loss, auxiliary losses and precision, gradient clipping, AdamW on float32
masters; with `--graphs` the passes of every side are CUDA graphs. Tokens attend across documents,
or with `--documents` only their own: `position_ids` restart with each document, as in the recipes
with `across_documents = false`. The dense side is PyTorch's `scaled_dot_product_attention`,
FlexAttention, which compiles for minutes, or over documents its `varlen_attn`: FlashAttention 2
with offsets, as in Transformers' `flash_attention_2`. With several, all others are compared with
the first. Give one back end of `scaled_dot_product_attention` at most, because a compiled layer
keeps the one that it was traced with.

Before they are timed, bands and `varlen_attn` are compared with a dense mask. On a GPU the kernels
of attention are also timed alone. Dense attention's step, less its kernels and with those of the
bands, is what the bands' step should take.

    python -m benchmarks.training --length 4096 --output benchmarks/results/training_h200.4096.json
    python -m benchmarks.training --model paper-small --length 1024 4096 --graphs --output ...
    python -m benchmarks.training --model llama-3.2-1b --documents 16 --dense varlen flex ...
    python -m benchmarks.training --merge benchmarks/results/training_h200.*.json --output ...
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from spattention.benchmarking.results import environment, processor
from spattention.benchmarking.timing import synchronize
from spattention.choice import attention_choice
from spattention.models import parameters_of
from spattention.training.graphs import WARM_UP, PassGraph, Recorder
from spattention.training.pretrain import prepare_model
from spattention.training.recipe import recipe_from
from spattention.training.work import work_per_token

from .training_documents import Documents, Separated
from .training_models import NAMES, random_model
from .training_sides import BACKENDS, Side, dense_side, predict
from .turns import turns

UNRECORDED = ("merge", "output", "turns")


def main() -> None:
    """Measure some lengths, or merge the files of several."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, nargs="+", default=[4096], help="context, in tokens")
    parser.add_argument("--model", default="olmoe-1b-7b", choices=NAMES)
    parser.add_argument("--layers", type=int, default=8, help="decoder layers")
    parser.add_argument("--graphs", action="store_true", help="passes are CUDA graphs")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens per pass, at least")
    parser.add_argument("--passes", type=int, default=4, help="passes per optimizer step")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each side")
    parser.add_argument("--checkpointing", action="store_true", help="on both sides")
    parser.add_argument("--loss", default="liger", choices=("plain", "chunked", "liger"))
    parser.add_argument("--patterns", nargs="*", default=["shared_local"], help="none: dense alone")
    parser.add_argument("--dense", nargs="+", default=["cudnn"], choices=list(BACKENDS))
    parser.add_argument("--documents", type=int, help="in a row, which do not see one another")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--vocabulary", type=int, help="instead of the preset's")
    parser.add_argument("--peak-tflops", type=float, default=700.0, help="what MFU is against")
    parser.add_argument("--profile", action="store_true", help="name the kernels of one step")
    parser.add_argument("--turns", type=Path, help="file to lock: one process times at a time")
    parser.add_argument("--commit", help="to record, where git cannot tell")
    parser.add_argument("--merge", nargs="+", type=Path, help="files of single lengths")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    if options.merge:
        merge(options.merge, options.output)
        return
    # Each side has its own graphs; beyond the limit a step would run uncompiled, and be timed so.
    limit = 8 * (len(options.dense) + len(options.patterns))
    parts: list[dict[str, Any]] = []
    for length in options.length:
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            print(f"{torch.cuda.memory_allocated() / 2**30:.1f} GiB in use", flush=True)
        one = argparse.Namespace(**vars(options) | {"length": length})
        settings: dict[str, Any] = {"recompile_limit": limit, "fail_on_recompile_limit_hit": True}
        with torch._dynamo.config.patch(**settings), turns(options.turns) as alone:
            parts.append(measure(one, alone))
        print(table(parts[-1]["rows"]), flush=True)
        if options.output is not None:
            write(options.output, parts[0] if len(options.length) == 1 else together(parts))


def measure(options: argparse.Namespace, alone: Callable[[], None]) -> dict[str, Any]:
    """All sides at one length; `alone` is called before anything is timed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = recipe_from(
        {
            "model": options.model,
            "data": "random tokens",
            "context": options.length,
            "steps": 1,
            "batch": 1,
            "learning_rate": 1e-4,
            "warmup": 0,
            "precision": "bfloat16",
            "loss": options.loss,
            "compile": not options.no_compile,
            "checkpointing": options.checkpointing,
        }
    )
    torch.manual_seed(0)
    model = random_model(options.model, options.length, options.layers, options.vocabulary, device)
    config = model.config
    windows = max(1, options.tokens // options.length)
    optimizer = prepare_model(recipe, model, options.passes, device)
    assert optimizer is not None
    model.train()
    batch = torch.randint(config.vocab_size, (windows, options.length), device=device)
    documents = None
    if options.documents is not None:
        documents = Documents.of(options.documents, options.length)
    step = stepper(model, optimizer, recipe.clip, batch, options.passes, documents)
    heads = config.num_attention_heads
    packed = None if documents is None else Documents(documents.lengths * windows)
    sides = [dense_side(name, heads, options.length, packed) for name in options.dense]
    sides += [
        Side(text, attention_choice(text, heads, options.length), None) for text in options.patterns
    ]
    for side in sides:
        side.compare(model, batch, documents)
        if device.type == "cuda":
            side.prepare_kernels(config, windows, options.length, documents)
    graphs = graphs_of(model, len(sides)) if options.graphs else [None] * len(sides)
    for side, graph in zip(sides, graphs):
        began = time.perf_counter()
        side.graph = graph
        with side.chosen(model):
            # Compiles, tunes, allocates, and records.
            for _ in range(2 if graph is None else WARM_UP // options.passes + 2):
                side.loss = step(side)
        if graph is not None and graph.replay is None:
            raise RuntimeError(f"{side.name} has no graph: {graph.reason}")
        print(f"{side.name}: ready after {time.perf_counter() - began:.0f} s", flush=True)
    losses = {side.name: side.loss for side in sides}
    if not all(0 < loss < 30 for loss in losses.values()):
        raise RuntimeError(f"a loss is out of range: {losses}")
    alone()
    if device.type == "cuda":
        for side in sides:
            side.time_kernels(config.num_hidden_layers * options.passes)
    peak_before(device)
    for repeat in range(options.repeats):
        for side in sides:
            with side.chosen(model):
                synchronize(device)
                began = time.perf_counter()
                step(side)
                synchronize(device)
                side.seconds.append(time.perf_counter() - began)
        print(f"repeat {repeat + 1} of {options.repeats}", flush=True)
    tokens = batch.numel() * options.passes
    rows = [row(options, model, side, tokens, documents) for side in sides]
    medians = {side.name: entry["seconds"] for side, entry in zip(sides, rows)}
    for side, entry in zip(sides, rows):
        entry["over_dense"] = rows[0]["seconds"] / entry["seconds"]
        entry.update(predict(sides[0], side, medians))
    found = {
        "what": "training throughput",
        "date": datetime.now(UTC).date().isoformat(),
        "environment": environment() if device.type == "cuda" else {"cpu": processor()},
        "settings": {
            name: value for name, value in vars(options).items() if name not in UNRECORDED
        },
        "documents": None if documents is None else documents.lengths,
        "parameters": model.num_parameters(),
        "active_parameters": parameters_of(model).active,
        "windows_per_pass": windows,
        "peak_memory": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "rows": rows,
    }
    found["environment"]["commit"] = options.commit or found["environment"].get("commit")
    if options.profile:
        found["kernels"] = {side.name: profile(model, side, step) for side in sides}
        for name, kernels in found["kernels"].items():
            print(f"\n{name}")
            for kernel in kernels:
                print(f"{kernel['milliseconds']:10.2f} ms {kernel['calls']:6d} x {kernel['name']}")
    return found


def graphs_of(model: Any, count: int) -> list[PassGraph]:
    """Graphs of passes of one model, one for each side, which share their memory."""

    def tell(reason: str) -> None:
        print(f"without a graph: {reason}", flush=True)

    recorder = Recorder()
    return [
        PassGraph(lambda inputs: run_pass(model, inputs), model.parameters(), tell, recorder)
        for _ in range(count)
    ]


def run_pass(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """A forward and backward pass; the detached loss."""
    loss: torch.Tensor = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.detach()


def stepper(
    model: Any,
    optimizer: torch.optim.Optimizer,
    clip: float,
    batch: torch.Tensor,
    passes: int,
    documents: Documents | None,
) -> Callable[[Side], float]:
    """One optimizer step of a side as a function; it returns the loss of the last pass."""
    items = torch.tensor(batch.numel() * passes, device=batch.device)
    inputs = {"input_ids": batch, "labels": batch, "num_items_in_batch": items}
    if documents is not None:
        inputs["position_ids"] = documents.positions(batch.device).expand_as(batch)

    def step(side: Side) -> float:
        for _ in range(passes):
            loss = run_pass(model, inputs) if side.graph is None else side.graph(inputs)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        model.zero_grad()
        return float(loss) * passes

    return step


def row(
    options: argparse.Namespace, model: Any, side: Side, tokens: int, documents: Documents | None
) -> dict[str, Any]:
    """What a side's steps say."""
    seconds = statistics.median(side.seconds)
    attention = side.attention if documents is None else Separated(side.attention, documents)
    work = work_per_token(model, attention, options.length)
    return {
        "model": options.model,
        "graphs": options.graphs,
        "length": options.length,
        "attention": side.name,
        "seconds": seconds,
        "all_seconds": side.seconds,
        "spread": (max(side.seconds) - min(side.seconds)) / seconds,
        "tokens_per_second": tokens / seconds,
        "work_per_token": work,
        "mfu": tokens / seconds * work / options.peak_tflops / 1e12,
        "loss": side.loss,
        "kernel_seconds": side.kernel_seconds,
        "kernels": side.kernels,
        "check": side.check,
    }


def profile(model: Any, side: Side, step: Callable[[Side], float]) -> list[dict[str, Any]]:
    """The kernels that take most of a step, by name: their types tell what they multiply."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with side.chosen(model), torch.profiler.profile(activities=kinds) as found:
        step(side)
        synchronize(next(model.parameters()).device)
    events = [e for e in found.key_averages() if e.self_device_time_total > 0]
    events.sort(key=lambda e: -e.self_device_time_total)
    return [
        {"name": e.key[:160], "calls": e.count, "milliseconds": e.self_device_time_total / 1e3}
        for e in events[:25]
    ]


def peak_before(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| model | graphs | length | attention | tokens/s | spread | MFU | over dense | "
        "of the predicted gain | of the predicted speed |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['model']} | {'yes' if r['graphs'] else 'no'} | {r['length']:,} | "
        f"{r['attention']} | {r['tokens_per_second']:,.0f} | "
        f"{100 * r['spread']:.1f} % | {100 * r['mfu']:.1f} % | {r['over_dense']:.3f} | "
        f"{share(r, 'gain')} | {share(r, 'speed')} |"
        for r in rows
    ]
    return "\n".join(lines)


def share(row: dict[str, Any], of: str) -> str:
    """How much of a prediction a row reaches; empty without one."""
    found = row.get(f"share_of_predicted_{of}")
    return "" if found is None else f"{found:.2f}"


def together(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Results of several lengths in one file."""
    return {"what": "training throughput", "parts": parts}


def write(output: Path, found: dict[str, Any]) -> None:
    """Write results at once."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(output)


def merge(files: list[Path], output: Path) -> None:
    """One file, and a table beside it, of several lengths."""
    read = [json.loads(file.read_text()) for file in files]
    parts = [part for found in read for part in found.get("parts", [found])]
    parts.sort(key=lambda part: (part["settings"]["model"], part["settings"]["length"]))
    write(output, together(parts))
    rows = [
        {"model": part["settings"]["model"], "graphs": part["settings"].get("graphs"), **entry}
        for part in parts
        for entry in part["rows"]
    ]
    facts = parts[0]["environment"]
    text = "\n".join(
        [
            f"# Training throughput on {facts.get('gpu', facts.get('cpu'))}",
            "",
            f"- {json.dumps(facts)}",
            *(f"- {p.get('date', '')} {json.dumps(p['settings'])}" for p in parts),
            "",
            "Medians of interleaved steps; spread is the range over the median; MFU as in",
            "`spattention.training.work`, recomputation not counted. The predicted step is dense",
            "attention's, less its kernels' time and with the bands' kernels' time, each alone.",
            "",
            table(rows),
            "",
        ]
    )
    output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
