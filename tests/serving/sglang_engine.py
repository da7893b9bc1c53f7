"""Runs SGLang on the CPU in a process of its own, as a user's script would.

    python sglang_engine.py '{"folder": "", "runs": [[[1, 2], [3]]], "tokens": 8, "settings": {}}'

The line of output that starts with `answer` goes on with JSON: of each run the tokens, and the
prompt tokens that were cached.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ANSWER = "answer "
STUBS = Path(__file__).parent / "sglang_stubs"
SETTINGS = {
    "device": "cpu",
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "disable_overlap_schedule": True,
    "max_total_tokens": 4096,
    "max_running_requests": 4,
    "chunked_prefill_size": 64,  # longer prompts are prefilled in chunks
    "context_length": 512,
    "disable_cuda_graph": True,
    "watchdog_timeout": 600,
    "log_level": "error",
}


def generate_in_sglang(
    folder: Path, runs: list[list[list[int]]], tokens: int, **settings: Any
) -> list[dict[str, Any]]:
    """Greedy continuations of each run's prompts, which are served at once, run after run."""
    # SGLang asks where each rank runs.
    ranks = settings.get("tp_size", 1)
    places = "|".join(str(rank % (os.cpu_count() or 1)) for rank in range(ranks))
    variables = {"SGLANG_CPU_OMP_THREADS_BIND": places} if ranks > 1 else {}
    done = call(folder, runs, tokens, settings, variables)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (answer,) = (line for line in done.stdout.splitlines() if line.startswith(ANSWER))
    found: list[dict[str, Any]] = json.loads(answer.removeprefix(ANSWER))
    return found


def start_error(folder: Path, variables: dict[str, str] | None = None, **settings: Any) -> str:
    """Everything that SGLang writes where it refuses a folder under these settings."""
    done = call(folder, [], 1, settings, variables or {})
    assert done.returncode != 0, done.stdout[-3000:]
    return done.stdout + done.stderr


def call(
    folder: Path,
    runs: list[list[list[int]]],
    tokens: int,
    settings: dict[str, Any],
    variables: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    request = {"folder": str(folder), "runs": runs, "tokens": tokens, "settings": settings}
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(STUBS), *filter(None, [kept.get("PYTHONPATH")])]
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "SGLANG_USE_CPU_ENGINE": "1"}
    return subprocess.run(
        [sys.executable, __file__, json.dumps(request)],
        capture_output=True,
        text=True,
        env=kept | quiet | {"PYTHONPATH": os.pathsep.join(paths)} | (variables or {}),
        timeout=600,
    )


def generate(request: dict[str, Any]) -> list[dict[str, Any]]:
    import sglang

    engine = sglang.Engine(model_path=request["folder"], **SETTINGS | request["settings"])
    sampling = {"temperature": 0, "max_new_tokens": request["tokens"], "ignore_eos": True}
    answers = []
    for prompts in request["runs"]:
        outputs = engine.generate(input_ids=prompts, sampling_params=sampling)
        answers.append(
            {
                "tokens": [output["output_ids"] for output in outputs],
                "cached": [output["meta_info"]["cached_tokens"] for output in outputs],
            }
        )
    # SGLang ends this process with its engine.
    print("\n" + ANSWER + json.dumps(answers), flush=True)
    engine.shutdown()
    return answers


if __name__ == "__main__":
    generate(json.loads(sys.argv[1]))
