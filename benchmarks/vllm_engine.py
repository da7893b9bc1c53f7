"""Decoding inside vLLM on one GPU: a model with bands beside the same model dense.

Every pattern is an engine in a process of its own: layers of Llama 3 8B's shape with random
weights. All engines start at once, which takes longest. Then one after the other serves requests of
one length at once, while the others wait, and then those of the next length.

Timed are the steps in which every request decodes, from one step's return to the next, host
included; vLLM captures them in CUDA graphs. Prompts are prefilled in chunks before that, by vLLM's
own plan. `--profile` also says which kernels the steps launched and what the host did.

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
from pathlib import Path
from typing import Any

import torch

from spattention.benchmarking.results import write_rows

from .serving_memory import BLOCK, LONGEST
from .serving_patterns import HEAD_DIM, HEADS, KV_HEADS, LOCAL, PATTERNS
from .vllm_profile import PROFILED, profile

VOCABULARY = 32000
# Pattern and vLLM's back end; of the memory of a dense cache, the part that this one needs; the
# longest prompts, so that all caches fit a GPU together.
ENGINES = (
    ("geometric", "", 0.40, LONGEST),
    ("uniform", "", 0.73, LONGEST),
    ("dense", "FLASH_ATTN", 1.03, LONGEST),
    ("dense", "TRITON_ATTN", 1.03, 16384),
)
COMPILING: dict[str, dict[str, Any]] = {
    "default": {},
    "none": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
}
TIMED = 64  # steps
CHUNK = 8192  # tokens of a step


@dataclass(frozen=True)
class Load:
    """What one engine serves.

    Attributes:
        pattern: of `PATTERNS`; "dense" is the stock model.
        attention: vLLM's back end of the stock model; empty for bands, which have their own.
        layers: of the model.
        longest: tokens of the longest prompt.
        requests: how many come at once.
        new_tokens: of each request; the first ones decode while the last one's prompt is read.
        memory: bytes of the cache, of all layers.
        compiling: of `COMPILING`.
    """

    pattern: str
    attention: str
    layers: int
    longest: int
    requests: int
    new_tokens: int
    memory: int
    compiling: str


def save_config(folder: Path, pattern: str, layers: int) -> None:
    """The config of a folder whose weights vLLM draws."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import spattention as spa

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=14336,
        num_hidden_layers=layers,
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


def serve(load: Load) -> None:
    """Answer each line of the input, a length and whether to profile, by the milliseconds of a
    step, and what the engine says of its cache. The first answer says that it has started.
    """
    # vLLM writes to the output, too.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        engine = start(load)
        for length in (2048, min(load.longest, 2 * CHUNK)):  # some kernels compile when first used
            decode(engine, load, length)
        print("{}", file=answers, flush=True)
        facts = facts_of(engine)
        for line in sys.stdin:
            length, profiled = json.loads(line)
            found = decode(engine, load, length, profiled)
            print(json.dumps(found | facts), file=answers, flush=True)


def start(load: Load) -> Any:
    """vLLM's engine, in this process."""
    from vllm import LLM

    settings: dict[str, Any] = {
        "dtype": "bfloat16",
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "block_size": BLOCK,
        "max_model_len": load.longest + load.new_tokens,
        "max_num_batched_tokens": CHUNK,
        "max_num_seqs": load.requests,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": load.memory,
        "gpu_memory_utilization": 0.05,
        "compilation_config": COMPILING[load.compiling],
    }
    if load.attention:
        settings["attention_backend"] = load.attention
    with tempfile.TemporaryDirectory() as folder:
        save_config(Path(folder), load.pattern, load.layers)
        return LLM(folder, **settings).llm_engine


def facts_of(engine: Any) -> dict[str, Any]:
    from vllm.compilation.counter import compilation_counter
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    config, scheduler = engine.vllm_config, engine.engine_core.engine_core.scheduler
    fit = get_max_concurrency_for_kv_cache_config(config, scheduler.kv_cache_config)
    return {
        "blocks": scheduler.kv_cache_manager.block_pool.num_gpu_blocks,
        "longest_requests_that_fit": fit,
        "cuda_graphs": compilation_counter.num_cudagraph_captured,
        "cudagraph_mode": config.compilation_config.cudagraph_mode.name,
        "compilation_mode": config.compilation_config.mode.name,
        "async_scheduling": config.scheduler_config.async_scheduling,
    }


def decode(engine: Any, load: Load, length: int, profiled: bool = False) -> dict[str, Any]:
    """Serve requests of one length at once, and time the steps that only decode."""
    from vllm import SamplingParams

    pool = engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    generator = torch.Generator().manual_seed(length)
    sampling = SamplingParams(
        temperature=0, max_tokens=load.new_tokens, ignore_eos=True, detokenize=False
    )
    for index in range(load.requests):
        prompt = torch.randint(VOCABULARY, (length,), generator=generator).tolist()
        engine.add_request(f"{length}-{index}", {"prompt_token_ids": prompt}, sampling)
    begin = time.perf_counter()
    # Some steps more, so that chunks of prompts are no part of what is timed.
    for _ in range(4):
        while len(engine.step()) < load.requests:
            pass
    before = time.perf_counter() - begin
    spans = []
    for _ in range(TIMED):
        begin = time.perf_counter()
        served = len(engine.step())
        spans.append((time.perf_counter() - begin, served))
    decoding = [seconds for seconds, served in spans if served == load.requests]
    found = {
        "length": length,
        "milliseconds_a_step": 1e3 * statistics.median(decoding),
        "steps": len(decoding),
        "seconds_before": before,
        "blocks_in_use": pool.num_gpu_blocks - pool.get_num_free_blocks(),
    }
    if profiled:
        found["profile"] = profile(engine)
    while engine.has_unfinished_requests():
        engine.step()
    return found


class Engine:
    """`serve` in a process of its own."""

    def __init__(self, load: Load) -> None:
        self.load = load
        command = [sys.executable, "-m", "benchmarks.vllm_engine", "--load", json.dumps(vars(load))]
        variables = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables
        )

    def answer(self) -> dict[str, Any] | None:
        """What the engine says next; None if it has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return dict(json.loads(line)) if line else None

    def ask(self, length: int, profiled: bool) -> dict[str, Any] | None:
        assert self.process.stdin is not None
        print(json.dumps([length, profiled]), file=self.process.stdin, flush=True)
        return self.answer()


def start_engines(options: argparse.Namespace) -> list[Engine]:
    """All engines, each with the memory that it needs for the longest requests."""
    engines = []
    for pattern, attention, part, most in ENGINES:
        if (attention or pattern) not in options.engines:
            continue
        longest = min(most, max(options.lengths))
        new_tokens = TIMED + PROFILED + 20 + options.requests * (longest // CHUNK + 2)
        tokens = options.requests * (longest + new_tokens)
        memory = int(part * tokens * options.layers * 4 * KV_HEADS * HEAD_DIM)
        shape = (options.layers, longest, options.requests, new_tokens)
        engines.append(Engine(Load(pattern, attention, *shape, memory, options.compiling)))
    return engines


def main() -> int:
    """Serve every row, and write after each. An engine that fails does not stop the others."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--layers", type=int, default=16)
    names = [attention or pattern for pattern, attention, *_ in ENGINES]
    parser.add_argument("--engines", nargs="+", choices=names, default=names)
    parser.add_argument("--compiling", choices=COMPILING, default="default")
    parser.add_argument("--profile", type=int, nargs="+", default=[], help="of these lengths")
    parser.add_argument("--commit", help="where git cannot tell it")
    parser.add_argument("--load", help="serve one load, as JSON")
    options = parser.parse_args()
    if options.load is not None:
        serve(Load(**json.loads(options.load)))
        return 0
    versions = {
        "gpu": torch.cuda.get_device_name(),
        "vllm": version("vllm"),
        "triton": version("triton"),
    }
    what = "milliseconds of a decoding step inside vLLM"
    settings = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    settings |= {"layers": options.layers, "local": LOCAL, "span": LONGEST, "steps": TIMED}
    engines = start_engines(options)
    failed = [engine for engine in engines if engine.answer() is None]
    rows: list[dict[str, Any]] = []
    for length in options.lengths:
        for engine in engines:
            if engine in failed or length > engine.load.longest:
                continue
            found = engine.ask(length, length in options.profile)
            if found is None:
                failed.append(engine)
                continue
            rows.append(vars(engine.load) | found)
            print({name: fact for name, fact in rows[-1].items() if name != "profile"}, flush=True)
            if options.output is not None:
                facts = {"commit": options.commit, "environment": versions}
                write_rows(options.output, what, settings, rows, **facts)
    for engine in engines:
        engine.process.communicate()
    for engine in failed:
        print(f"failed: {engine.load}")
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main())
