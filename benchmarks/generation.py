"""Generation end to end in one model of OLMoE's shape: tokens per second, memory of the cache, and
the first pass over a long prompt.

The same random weights attend in three ways:

    dense           PyTorch's attention with Transformers' static cache
    dense, kernel   all distances as a band, in the same static cache: dense attention that is
                    decoded as well as bands are
    shared_local    bands, in a BandCache

Decoding is compiled as `generate` compiles it ("reduce-overhead": CUDA graphs). Its caches are
filled at random, for speed: what lies in them costs what a real text would. The first pass over the
prompt is compiled layer by layer, and fills Transformers' dynamic cache or a BandCache. Dense
attention may choose among PyTorch's back ends, cuDNN's first.

    python -m benchmarks.generation --output benchmarks/results/generation_h200.json
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, StaticCache

import spattention as spa
from spattention.benchmarking.results import environment, write_rows
from spattention.benchmarking.timing import cache_bytes, synchronize, wall_seconds
from spattention.compat.pytorch import raise_recompile_limit
from spattention.models import build, preset

BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
WAYS = ("dense", "dense, kernel", "shared_local")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="olmoe-1b-7b", help="preset of spattention.models")
    parser.add_argument("--layers", type=int, help="instead of the preset's")
    parser.add_argument("--vocabulary", type=int, help="instead of the preset's")
    parser.add_argument("--context", type=int, default=65536, help="tokens before the first step")
    parser.add_argument("--batch", type=int, default=4, help="rows while decoding")
    parser.add_argument("--prompts", type=int, default=1, help="rows of the first pass")
    parser.add_argument("--steps", type=int, default=64, help="timed tokens of each row")
    parser.add_argument("--repeats", type=int, default=3, help="timed first passes")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--eager", action="store_true", help="without compiling")
    parser.add_argument("--commit", help="to record, where git cannot tell")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = preset(
        options.model,
        num_layers=options.layers,
        vocab_size=options.vocabulary,
        context=options.context,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = build(chosen, pattern=None, dtype=dtype).eval()
    pattern = spa.BandPattern.shared_local(chosen.pattern.num_heads, options.context)
    rows: list[dict[str, Any]] = []
    for way in options.ways:
        apply(model, way, pattern)
        rows.append({"attention": way})
        for part in options.parts:
            rows[-1] |= PARTS[part](model, way, options)
        print(f"measured {way}", flush=True)
    show(rows)
    if options.output is not None:
        settings = {k: v for k, v in vars(options).items() if k not in ("output", "commit")}
        settings["dtype"] = str(dtype)
        where = environment() if device.type == "cuda" else {}
        write_rows(
            options.output, "generation", settings, rows, commit=options.commit, environment=where
        )


def apply(model: Any, way: str, pattern: spa.BandPattern) -> None:
    """The model as it is for "dense"; else its bands, which replace those that it had."""
    if way == "dense, kernel":
        spa.hf.apply(model, spa.BandPattern.dense(pattern.num_heads, 2 * pattern.span))
    elif way != "dense":
        spa.hf.apply(model, pattern)
    elif hasattr(model.config, "spattention"):
        raise ValueError("`--ways` must begin with dense, the model has bands from there on")


def first_pass(model: Any, way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds for a prompt of `context` tokens, its cache filled and its last logits computed."""
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (options.prompts, options.context), device=model.device)

    # Layer by layer: compiled as a whole, a dense model makes a mask of tokens x tokens and leaves
    # the causal kernels.
    raise_recompile_limit(4 * len(model.model.layers))
    forwards = [layer.forward for layer in model.model.layers]
    for layer in [] if options.eager else model.model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)
    bands = spa.hf.BandCache(model.config) if way == "shared_local" else None
    with torch.no_grad(), sdpa_kernel(BACKENDS, set_priority=True):
        if bands is not None:
            model(ids[:, :1], past_key_values=bands)  # so that it has its tensors

        def run() -> None:
            if bands is not None:
                bands.reset()
            cache = DynamicCache(config=model.config) if bands is None else bands
            model(ids, past_key_values=cache, logits_to_keep=1)

        taken = wall_seconds(run, options.repeats, device=model.device)
    for layer, forward in zip(model.model.layers, forwards):
        layer.forward = forward
    return {"prefill_seconds": taken}


def decoding(model: Any, way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of all rows together, and bytes of the cache."""
    torch.compiler.reset()  # lets go of what was compiled before, and of its memory
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    room = options.context + options.steps + 32
    if way == "shared_local":
        cache: Any = spa.hf.BandCache(model.config)
    else:
        cache = StaticCache(config=model.config, max_cache_len=room)
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (options.steps + 16, options.batch, 1), device=model.device)
    forward = model.forward
    if not options.eager:
        forward = torch.compile(forward, mode="reduce-overhead", fullgraph=True)

    def step(token: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return forward(token, past_key_values=cache).logits.argmax(dim=-1)

    with torch.no_grad():
        model(ids[0], past_key_values=cache)  # one token, so that the cache has its tensors
        fill(cache, options.context)
        began = time.perf_counter()
        for token in ids[:16]:
            step(token)
        synchronize(model.device)
        warm_up = time.perf_counter() - began
        began = time.perf_counter()
        for token in ids[16:]:
            step(token)
        synchronize(model.device)
        taken = time.perf_counter() - began
    return {
        "tokens_per_second": options.batch * options.steps / taken,
        "milliseconds_per_step": taken / options.steps * 1e3,
        "cache_bytes": cache_bytes(cache),
        "warm_up_seconds": warm_up,
    }


PARTS = {"prefill": first_pass, "decoding": decoding}


def fill(cache: Any, tokens: int) -> None:
    """Make a cache of either kind hold a text of so many random tokens."""
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            for row in tensor:
                row.normal_()
        if isinstance(cache, StaticCache):
            layer.cumulative_length.fill_(tokens)
        else:
            layer.store.counts.fill_(tokens)


def show(rows: list[dict[str, Any]]) -> None:
    """A table of what was measured; ratios are against the first row."""
    table = Table("attention")
    kinds = (
        ("prefill, s", "prefill_seconds", "{:.3f}", 1),
        ("tokens/s", "tokens_per_second", "{:.1f}", -1),
        ("cache, bytes", "cache_bytes", "{:,}", 1),
    )
    measured = [kind for kind in kinds if kind[1] in rows[0]]
    for title, *_ in measured:
        table.add_column(title)
        table.add_column("x")
    for row in rows:
        cells = [row["attention"]]
        for _, name, form, better in measured:
            cells += [form.format(row[name]), f"{(rows[0][name] / row[name]) ** better:.2f}"]
        table.add_row(*cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
