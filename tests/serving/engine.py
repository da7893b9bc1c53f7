"""Runs vLLM in a process of its own, as a user's script would.

    python engine.py generate '{"folder": "", "runs": [[[1, 2], [3]]], "tokens": 8, "settings": {}}'
    python engine.py start '{"starts": [[FOLDER, {}], ...]}'

The line of output that starts with `answer` goes on with JSON. For `generate`: the tokens, the
cached prompt tokens, the most blocks in use, the interruptions, the captured CUDA graphs and the
lines of this library in vLLM's log, of each run. For `start`: the error with which vLLM's own
checks end, or null, of each folder and its settings.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ANSWER = "answer "
SETTINGS = {
    "dtype": "float32",
    "block_size": 16,
    "max_model_len": 512,
    "max_num_batched_tokens": 64,  # longer prompts are prefilled in chunks
    "max_num_seqs": 4,
    "enforce_eager": True,  # compiling takes a minute and more
    "kv_cache_memory_bytes": 1 << 24,
}


def environment(**changes: str) -> dict[str, str]:
    """Without a network, one thread, the engine in the process that asked for it."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    threads = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return kept | quiet | threads | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | changes


def generate_in_vllm(
    folder: Path,
    runs: list[list[list[int]]],
    tokens: int,
    adapter: Path | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Greedy continuations of each run's prompts, which are served at once, run after run."""
    request = {"folder": str(folder), "runs": runs, "tokens": tokens, "settings": settings}
    request["adapter"] = None if adapter is None else str(adapter)
    return _call("generate", request, environment())


def start_errors(starts: list[tuple[Path, dict[str, Any]]], **variables: str) -> list[str | None]:
    """With which message vLLM refuses each folder under these settings; None where it would load
    it.
    """
    request = {"starts": [(str(folder), settings) for folder, settings in starts]}
    return _call("start", request, environment(**variables))


def _call(command: str, request: dict[str, Any], variables: dict[str, str]) -> Any:
    done = subprocess.run(
        [sys.executable, __file__, command, json.dumps(request)],
        capture_output=True,
        text=True,
        env=variables,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    # Other processes of vLLM write to the same output.
    (answer,) = (line for line in done.stdout.splitlines() if line.startswith(ANSWER))
    return json.loads(answer.removeprefix(ANSWER))


def _generate(request: dict[str, Any]) -> Any:
    from vllm import LLM, SamplingParams
    from vllm.compilation.counter import compilation_counter
    from vllm.lora.request import LoRARequest

    adapter = request.get("adapter")
    lora = None if adapter is None else LoRARequest("adapter", 1, adapter)
    log: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        log.append(record.getMessage())
        return True

    # vLLM takes handlers off again when it sets up its own.
    logging.getLogger("vllm.spattention").addFilter(keep)
    engine = LLM(request["folder"], **SETTINGS | request["settings"]).llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    sampling = SamplingParams(
        temperature=0, max_tokens=request["tokens"], ignore_eos=True, detokenize=False
    )
    answers = []
    for run, prompts in enumerate(request["runs"]):
        for index, prompt in enumerate(prompts):
            given = {"prompt_token_ids": prompt}
            engine.add_request(f"{run}-{index}", given, sampling, lora_request=lora)
        finished: dict[int, Any] = {}
        in_use = []
        interruptions: dict[str, int] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    finished[int(output.request_id.split("-")[1])] = output
            interruptions |= {id: r.num_preemptions for id, r in scheduler.requests.items()}
            in_use.append(pool.num_gpu_blocks - pool.get_num_free_blocks())
        in_order = [finished[index] for index in range(len(prompts))]
        answers.append(
            {
                "tokens": [list(output.outputs[0].token_ids) for output in in_order],
                "cached": [output.num_cached_tokens for output in in_order],
                "most_blocks": max(in_use),
                "interrupted": sum(interruptions.values()),
                "log": log,
                "cuda_graphs": compilation_counter.num_cudagraph_captured,
            }
        )
    return answers


def _start(request: dict[str, Any]) -> list[str | None]:
    from vllm.engine.arg_utils import EngineArgs

    errors: list[str | None] = []
    for folder, settings in request["starts"]:
        try:
            EngineArgs(folder, **SETTINGS | settings).create_engine_config()
        except ValueError as error:
            errors.append(str(error))
        else:
            errors.append(None)
    return errors


if __name__ == "__main__":
    command, request = sys.argv[1:]
    answer = {"generate": _generate, "start": _start}[command](json.loads(request))
    print("\n" + ANSWER + json.dumps(answer), flush=True)
