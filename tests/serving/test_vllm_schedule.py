"""vLLM's schedule of a queue of requests, as the benchmark records it."""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest

from .engine import environment

pytest.importorskip("vllm")
pytestmark = pytest.mark.serving


def test_a_schedule_has_every_token_and_its_blocks(tmp_path: Path) -> None:
    """Each request computes its prompt and its new tokens once, in blocks of its own."""
    output = tmp_path / "schedule.json.xz"
    command = [sys.executable, "-m", "benchmarks.serving_schedule", "--requests", "2"]
    root = Path(__file__).parents[2]
    subprocess.run(
        [*command, "--output", str(output)], check=True, cwd=root, env=environment(), timeout=600
    )
    schedule = json.loads(lzma.decompress(output.read_bytes()))
    wanted = [prompt + schedule["new_tokens"] - 1 for prompt in schedule["prompts"]]
    for run in schedule["runs"].values():
        computed = [0, 0]
        for step in run["steps"]:
            for request, before, new, _, blocks in step:
                assert before == computed[request]
                computed[request] += new
                assert len(blocks) == len(run["groups"])
        assert computed == wanted
        for group in range(len(run["groups"])):
            held = [b for step in run["steps"] for *_, blocks in step for b in blocks[group]]
            assert 0 not in held
            assert max(held) < run["blocks"]
