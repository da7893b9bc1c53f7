"""Time the prefill of one attention layer: dense, bands, and the related systems that need no
training or little of it, with the share of attention that RRAttention captures.

Queries and keys of a trained model say what a choice of blocks keeps; random ones do not.

    python -m benchmarks.prefill --model MODEL --text book.txt --layers 0 8 15 --output prefill.json
    python -m benchmarks.prefill --random 32 8 128 --lengths 8192 16384 --output prefill.json

Each result is checked on its last rows, before it is timed, against softmax attention under the
weights that the system reports.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from spattention.benchmarking.results import write_rows
from spattention.choice import attention_choice, is_other, named_pattern
from spattention.related.method import causal_attention, causal_weights

LENGTHS = (8192, 16384, 32768, 65536, 131072)
NAMES = (
    "dense",
    "shared_local:widths=geometric",
    "cca:group=16,window=1024",
    "rrattention:tau=0.95",
    "rrattention:tau=0.9",
    "rrattention:tau=0.8",
)
ROWS = 16  # the last, which are checked
SAMPLED = 64  # rows whose captured share is measured
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def random_inputs(sizes: Sequence[int], length: int, device: torch.device) -> dict[str, Tensors]:
    """Normal queries, keys and values of `heads, key/value heads, head_dim`."""
    heads, key_heads, size = sizes
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query, key, value = (
        torch.randn(1, count, length, size, generator=generator, device=device).to(dtype)
        for count in (heads, key_heads, key_heads)
    )
    return {"random": (query, key, value)}


def model_inputs(model: Any, ids: torch.Tensor, layers: Sequence[int]) -> dict[str, Tensors]:
    """Queries, keys and values of some layers over a text, rotary positions in them."""
    found: dict[str, Tensors] = {}
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(module: Any, query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> Any:
        if module.layer_idx in layers:
            found[f"layer {module.layer_idx}"] = (query, key, value)
        return stock(module, query, key, value, *rest, **more)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = watched
    try:
        with torch.no_grad():
            model(ids, use_cache=False, logits_to_keep=1)
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    return found


def prepared(name: str, heads: int, length: int) -> tuple[Callable[..., Any], Any]:
    """The attention of a name, `(query, key, value, scale) -> out`, and its layer or bands."""
    if not is_other(name):
        bands = None if name == "dense" else named_pattern(name, heads, length)
        return partial(causal_attention, bands=bands), bands
    choice: Any = attention_choice(name, heads, length)
    layer = choice.baseline.layer(0, 1)
    return layer.attend, layer


def check(out: torch.Tensor, tensors: Tensors, scale: float, part: Any) -> float:
    """The largest error of the last rows; raises if it is more than rounding."""
    query, key, value = tensors
    length = key.shape[2]
    given = query, key, scale, length - ROWS, length
    weights = part.weights(*given) if hasattr(part, "weights") else causal_weights(*given, part)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    wanted = weights @ value.float()
    error = (out[:, :, -ROWS:].float() - wanted).abs().max().item()
    allowed = 8 * torch.finfo(out.dtype).eps * value.float().abs().max().item()
    if error > max(allowed, 1e-4):
        raise ValueError(f"the last rows must be within {allowed:.1e}, got an error of {error:.1e}")
    return error


def milliseconds(call: Callable[[], Any], device: torch.device, budget: float = 2.0) -> float:
    """Median time of a call, after one that warms up."""

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    once()
    first = once()
    return 1e3 * statistics.median(once() for _ in range(max(3, min(50, int(budget / first)))))


def row_of(name: str, where: str, tensors: Tensors, seconds: float = 2.0) -> dict[str, Any]:
    """One row of the results, each of whose times takes about `seconds` to measure."""
    query, key, _ = tensors
    length, scale = query.shape[2], query.shape[3] ** -0.5
    call, part = prepared(name, query.shape[1], length)
    with torch.no_grad():
        error = check(call(*tensors, scale), tensors, scale, part)
        row: dict[str, Any] = {"attention": name, "inputs": where, "tokens": length}
        row |= {"milliseconds": milliseconds(lambda: call(*tensors, scale), query.device, seconds)}
        row |= {"error": error}
        if hasattr(part, "captured"):
            kept = part.select(query, key, scale)
            starts = torch.linspace(0, length - SAMPLED, 4).long().tolist()
            given = [part.captured(query, key, scale, at, at + SAMPLED) for at in starts]
            row["captured"] = torch.cat(given, dim=2).mean().item()
            row["blocks"] = (kept.sum() / (kept.shape[2] * (kept.shape[2] + 1) / 2)).item()
            row["blocks"] /= kept.shape[0] * kept.shape[1]
            choose = milliseconds(lambda: part.select(query, key, scale), query.device, seconds)
            row["milliseconds_of_choice"] = choose
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="a trained model of Transformers, dense")
    parser.add_argument("--text", type=Path, help="what it reads; its first tokens are taken")
    parser.add_argument("--layers", type=int, nargs="+", default=[0])
    parser.add_argument("--random", type=int, nargs=3, metavar=("HEADS", "KV_HEADS", "HEAD_DIM"))
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--names", nargs="+", default=NAMES)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each time's measurement")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if (options.model is None) == (options.random is None):
        parser.error("give either --model with --text, or --random")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "none"
    settings = {name: str(value) for name, value in vars(options).items()}
    for length in options.lengths:
        if options.random:
            inputs = random_inputs(options.random, length, device)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                options.model, dtype=torch.bfloat16, attn_implementation="sdpa"
            )
            text = options.text.read_text(encoding="utf-8")
            ids = AutoTokenizer.from_pretrained(options.model)(text, return_tensors="pt").input_ids
            if ids.shape[1] < length:
                parser.error(f"--text has {ids.shape[1]} tokens, fewer than {length}")
            inputs = model_inputs(
                model.to(device).eval(), ids[:, :length].to(device), options.layers
            )
            del model
        for where, tensors in inputs.items():
            for name in options.names:
                rows.append(row_of(name, where, tensors, options.seconds))
                print(rows[-1], flush=True)
                write_rows(options.output, "prefill", settings, rows, environment={"gpu": gpu})


if __name__ == "__main__":
    main()
