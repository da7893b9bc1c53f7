"""Decoding inside vLLM on one GPU: a model with bands beside the same model dense.

Every pattern is an engine in a process of its own: 16 layers of Llama 3 8B's shape with random
weights, the same memory for the cache, requests of one length at once, then those of the next.
Timed are the steps in which every request decodes, from one step's return to the next, host
included; vLLM captures them in CUDA graphs. Prompts are prefilled in chunks before that, by vLLM's
own plan.

    python -m benchmarks.vllm_engine --output benchmarks/results/vllm_cuda.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from spattention.benchmarking.results import write_rows

from .serving_memory import BLOCK, LONGEST
from .serving_patterns import HEAD_DIM, HEADS, KV_HEADS, LOCAL, PATTERNS

LAYERS, VOCABULARY = 16, 32000
ANSWER = "rows "
ENGINES = (("dense", "FLASH_ATTN"), ("geometric", ""), ("uniform", ""))
COMPILING: dict[str, dict[str, Any]] = {
    "default": {},
    "none": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
}


@dataclass(frozen=True)
class Load:
    """What one engine serves.

    Attributes:
        pattern: of `PATTERNS`; "dense" is the stock model.
        attention: vLLM's back end of the stock model; empty for bands, which have their own.
        lengths: tokens of each prompt, of one wave of requests after the other.
        requests: how many come at once.
        new_tokens: of each request.
        memory: bytes of the cache, of all layers.
        compiling: of `COMPILING`.
    """

    pattern: str
    attention: str
    lengths: list[int]
    requests: int
    new_tokens: int
    memory: int
    compiling: str


def save_config(folder: Path, pattern: str) -> None:
    """The config of a folder whose weights vLLM draws."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import spattention as spa

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=14336,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=2 * LONGEST,
        eos_token_id=None,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    if pattern != "dense":
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        spa.hf.apply(model, PATTERNS[pattern])
        config = model.config
        config.architectures = ["SpattentionLlamaForCausalLM"]
    config.save_pretrained(folder)


def serve(load: Load) -> list[dict[str, Any]]:
    """Of each length the milliseconds of a step, and what the engine says of its cache."""
    from vllm import LLM, SamplingParams
    from vllm.compilation.counter import compilation_counter
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    settings: dict[str, Any] = {
        "dtype": "bfloat16",
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "block_size": BLOCK,
        "max_model_len": max(load.lengths) + load.new_tokens,
        "max_num_batched_tokens": 8192,
        "max_num_seqs": load.requests,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": load.memory,
        "gpu_memory_utilization": 0.2,
        "compilation_config": COMPILING[load.compiling],
    }
    if load.attention:
        settings["attention_backend"] = load.attention
    with tempfile.TemporaryDirectory() as folder:
        save_config(Path(folder), load.pattern)
        engine = LLM(folder, **settings).llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    generator = torch.Generator().manual_seed(0)

    def steps(name: str, length: int, new_tokens: int) -> list[tuple[float, int, int]]:
        """Of each step its end, the requests that got a token, and the blocks in use."""
        sampling = SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        for index in range(load.requests):
            prompt = torch.randint(VOCABULARY, (length,), generator=generator).tolist()
            engine.add_request(f"{name}{index}", {"prompt_token_ids": prompt}, sampling)
        found = [(time.perf_counter(), 0, 0)]
        while engine.has_unfinished_requests():
            served = len(engine.step())
            blocks = pool.num_gpu_blocks - pool.get_num_free_blocks()
            found.append((time.perf_counter(), served, blocks))
        return found

    steps("warm", 2048, 8)
    config = engine.vllm_config.compilation_config
    fit = get_max_concurrency_for_kv_cache_config(engine.vllm_config, scheduler.kv_cache_config)
    facts = {
        "blocks": pool.num_gpu_blocks,
        "longest_requests_that_fit": fit,
        "cuda_graphs": compilation_counter.num_cudagraph_captured,
        "cudagraph_mode": config.cudagraph_mode.name,
        "compilation_mode": config.mode.name,
    }
    rows = []
    for length in load.lengths:
        timed = steps(f"{length}-", length, load.new_tokens)
        spans = [(b[0] - a[0], b[1]) for a, b in pairwise(timed)]
        decoding = [seconds for seconds, served in spans if served == load.requests]
        row = {
            "length": length,
            "milliseconds_a_step": 1e3 * statistics.median(decoding),
            "steps": len(decoding),
            "other_seconds": sum(seconds for seconds, _ in spans) - sum(decoding),
            "most_blocks": max(blocks for *_, blocks in timed),
        }
        rows.append(row | facts)
    return rows


def run(load: Load) -> list[dict[str, Any]]:
    """`serve` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.vllm_engine", "--load", json.dumps(vars(load))]
    variables = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=variables, timeout=600)
    answers = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if done.returncode or len(answers) != 1:
        raise RuntimeError(f"vLLM failed with {load}: {done.stdout[-3000:]}")
    given = {name: value for name, value in vars(load).items() if name != "lengths"}
    return [given | row for row in json.loads(answers[0].removeprefix(ANSWER))]


def main() -> int:
    """Serve every row, and write after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--memory", type=int, default=36 << 30, help="bytes of the cache")
    parser.add_argument("--compiling", choices=COMPILING, default="default")
    parser.add_argument("--commit", help="where git cannot tell it")
    parser.add_argument("--load", help="serve one load, as JSON, and print its rows")
    options = parser.parse_args()
    if options.load is not None:
        found = serve(Load(**json.loads(options.load)))
        print("\n" + ANSWER + json.dumps(found), flush=True)
        return 0
    versions = {
        "gpu": torch.cuda.get_device_name(),
        "vllm": version("vllm"),
        "triton": version("triton"),
    }
    settings = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "layers": LAYERS}
    settings |= {"local": LOCAL, "span": LONGEST}
    rows: list[dict[str, Any]] = []
    for pattern, attention in ENGINES:
        rest = (options.requests, options.new_tokens, options.memory, options.compiling)
        rows += run(Load(pattern, attention, options.lengths, *rest))
        print(*rows[-len(options.lengths) :], sep="\n", flush=True)
        if options.output is not None:
            what = "milliseconds of a decoding step inside vLLM"
            write_rows(
                options.output, what, settings, rows, commit=options.commit, environment=versions
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
