"""Throughput of full training steps, dense attention against bands, in one model of OLMoE's shape.

One model with one optimizer serves both sides: attention has no parameters, and the sides take
turns, so that a drift of the clock meets all of them. A step is what `spattention train` does:
passes with the recipe's loss, auxiliary losses and precision, gradient clipping, AdamW on float32
masters. The dense side is PyTorch's `scaled_dot_product_attention` with cuDNN or FlashAttention:
one of them per run, because a compiled layer keeps the one that it was traced with.

    python -m benchmarks.training --length 4096 --output benchmarks/results/training_h200.4096.json
    python -m benchmarks.training --merge benchmarks/results/training_h200.*.json --output ...
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from spattention.benchmarking.results import environment, processor
from spattention.benchmarking.timing import synchronize
from spattention.choice import AttentionChoice, attention_choice
from spattention.hf.config import remove_section
from spattention.models import build, preset
from spattention.training.pretrain import prepare_model
from spattention.training.recipe import Recipe, recipe_from
from spattention.training.work import active_parameters, work_per_token

BACKENDS = {
    "cudnn": ("dense cuDNN", SDPBackend.CUDNN_ATTENTION),
    "flash": ("dense FlashAttention", SDPBackend.FLASH_ATTENTION),
    "math": ("dense, PyTorch's own products", SDPBackend.MATH),
}


@dataclass
class Side:
    """One way to attend: how it is switched on, and what its steps took, in seconds. Between the
    sides the model has its stock attention.
    """

    name: str
    attention: AttentionChoice
    backend: SDPBackend | None
    seconds: list[float]

    @contextlib.contextmanager
    def chosen(self, model: Any) -> Iterator[None]:
        self.attention.apply(model)
        try:
            with sdpa_kernel(self.backend) if self.backend else contextlib.nullcontext():
                yield
        finally:
            remove_section(model.config)
            model.set_attn_implementation("sdpa")


def main() -> None:
    """Measure one length, or merge the files of several."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4096, help="context, in tokens")
    parser.add_argument("--model", default="olmoe-1b-7b", help="preset of spattention.models")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens per pass, at least")
    parser.add_argument("--passes", type=int, default=4, help="passes per optimizer step")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each side")
    parser.add_argument("--checkpointing", action="store_true", help="on both sides")
    parser.add_argument("--loss", default="liger", choices=("plain", "chunked", "liger"))
    parser.add_argument("--patterns", nargs="*", default=["shared_local"], help="none: dense alone")
    parser.add_argument("--dense", default="cudnn", choices=list(BACKENDS))
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--vocabulary", type=int, help="instead of the preset's")
    parser.add_argument("--peak-tflops", type=float, default=700.0, help="what MFU is against")
    parser.add_argument("--profile", action="store_true", help="name the kernels of one pass")
    parser.add_argument("--commit", help="to record, where git cannot tell")
    parser.add_argument("--merge", nargs="+", type=Path, help="files of single lengths")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    if options.merge:
        merge(options.merge, options.output)
        return
    # Each side has its own graphs; beyond the limit a step would run uncompiled, and be timed so.
    limit = 8 * (1 + len(options.patterns))
    with torch._dynamo.config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
        found = measure(options)
    print(table(found["rows"]))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        partial = options.output.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        partial.replace(options.output)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All sides at one length."""
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
    chosen = preset(
        options.model,
        context=options.length,
        num_layers=options.layers,
        vocab_size=options.vocabulary,
    )
    torch.manual_seed(0)
    with device:
        model = build(chosen, pattern=None)
    windows = max(1, options.tokens // options.length)
    optimizer = prepare_model(recipe, model, options.passes, device)
    assert optimizer is not None
    model.train()
    batch = torch.randint(chosen.config.vocab_size, (windows, options.length), device=device)
    step = stepper(model, optimizer, recipe, batch, options.passes)
    heads = chosen.pattern.num_heads
    name, backend = BACKENDS[options.dense]
    sides = [Side(name, attention_choice("dense", heads, options.length), backend, [])]
    sides += [
        Side(text, attention_choice(text, heads, options.length), None, [])
        for text in options.patterns
    ]
    losses = {}
    for side in sides:
        began = time.perf_counter()
        with side.chosen(model):
            for _ in range(2):  # compiles, tunes, allocates
                losses[side.name] = step()
        print(f"{side.name}: ready after {time.perf_counter() - began:.0f} s", flush=True)
    if not all(0 < loss < 30 for loss in losses.values()):
        raise RuntimeError(f"a loss is out of range: {losses}")
    peak_before(device)
    for repeat in range(options.repeats):
        for side in sides:
            with side.chosen(model):
                synchronize(device)
                began = time.perf_counter()
                step()
                synchronize(device)
                side.seconds.append(time.perf_counter() - began)
        print(f"repeat {repeat + 1} of {options.repeats}", flush=True)
    tokens = batch.numel() * options.passes
    rows = [row(options, model, side, tokens) for side in sides]
    for entry in rows:
        entry["over_dense"] = rows[0]["seconds"] / entry["seconds"]
    found = {
        "what": "training throughput",
        "environment": environment() if device.type == "cuda" else {"cpu": processor()},
        "settings": {k: v for k, v in vars(options).items() if k not in ("merge", "output")},
        "parameters": model.num_parameters(),
        "active_parameters": active_parameters(model),
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


def stepper(
    model: Any,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    batch: torch.Tensor,
    passes: int,
) -> Callable[[], float]:
    """One optimizer step as a function; it returns the loss of the last pass."""
    items = torch.tensor(batch.numel() * passes, device=batch.device)

    def step() -> float:
        for _ in range(passes):
            loss = model(
                input_ids=batch, labels=batch, use_cache=False, num_items_in_batch=items
            ).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        model.zero_grad()
        return float(loss.detach()) * passes

    return step


def row(options: argparse.Namespace, model: Any, side: Side, tokens: int) -> dict[str, Any]:
    """What a side's steps say."""
    seconds = statistics.median(side.seconds)
    work = work_per_token(model, side.attention, options.length)
    return {
        "length": options.length,
        "attention": side.name,
        "seconds": seconds,
        "all_seconds": side.seconds,
        "spread": (max(side.seconds) - min(side.seconds)) / seconds,
        "tokens_per_second": tokens / seconds,
        "work_per_token": work,
        "mfu": tokens / seconds * work / options.peak_tflops / 1e12,
    }


def profile(model: Any, side: Side, step: Callable[[], float]) -> list[dict[str, Any]]:
    """The kernels that take most of a step, by name: their types tell what they multiply."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with side.chosen(model), torch.profiler.profile(activities=kinds) as found:
        step()
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
        "| length | attention | tokens/s | spread | MFU | over dense |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['length']:,} | {r['attention']} | {r['tokens_per_second']:,.0f} | "
        f"{100 * r['spread']:.1f} % | {100 * r['mfu']:.1f} % | {r['over_dense']:.3f} |"
        for r in rows
    ]
    return "\n".join(lines)


def merge(files: list[Path], output: Path) -> None:
    """One file, and a table beside it, of several lengths."""
    parts = [json.loads(file.read_text()) for file in files]
    parts.sort(key=lambda part: part["settings"]["length"])
    output.write_text(json.dumps({"what": "training throughput", "parts": parts}, indent=1) + "\n")
    rows = [entry for part in parts for entry in part["rows"]]
    facts = parts[0]["environment"]
    text = "\n".join(
        [
            f"# Training throughput on {facts.get('gpu', facts.get('cpu'))}",
            "",
            f"- {json.dumps(facts)}",
            *(f"- {p['settings']['length']:,}: {json.dumps(p['settings'])}" for p in parts),
            "",
            "Medians of interleaved steps; spread is the range over the median; MFU as in",
            "`spattention.training.work`, recomputation not counted.",
            "",
            table(rows),
            "",
        ]
    )
    output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
