"""vLLM on a GPU, its attention by kernels, decoding inside CUDA graphs, against Transformers on the
CPU.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import spattention as spa

from . import engine, folders

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.serving,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NEW_TOKENS = 40
PROMPTS = folders.prompts([1, 70, 200, 300])
SHAPE = {"head_dim": 64}  # the kernels take it, and so do vLLM's own layers
PREFIXES = replace(folders.FIRST, prefix=3), replace(folders.SECOND, prefix=20)
MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "captured": {
        "enforce_eager": False,
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    },
    "compiled": {"enforce_eager": False},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prefix", [False, True])
def test_cuda_gives_transformers_tokens(tmp_path: Path, mode: str, prefix: bool) -> None:
    """Sinks, four requests at once in chunks of 64, and again from cached prefixes."""
    _compare(tmp_path, MODES[mode], PREFIXES if prefix else None, SHAPE)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_cuda_serves_heads_of_16(tmp_path: Path, mode: str) -> None:
    """Narrower heads than those of vLLM's own layers on a GPU."""
    _compare(tmp_path, MODES[mode], PREFIXES, {})


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_cuda_keeps_one_window_for_all_heads(tmp_path: Path, mode: str) -> None:
    """Without vLLM's hybrid manager all heads are one class, in one cache."""
    _compare(tmp_path, MODES[mode] | {"disable_hybrid_kv_cache_manager": True}, None, SHAPE)


def _compare(folder: Path, settings: dict[str, Any], patterns: Any, shape: dict[str, int]) -> None:
    """All tokens of new requests, and of the same ones again, are those of Transformers."""
    folder = folders.save(folder, patterns=patterns, sinks=True, **shape)
    settings = settings | {"gpu_memory_utilization": 0.05}
    first, again = engine.generate_in_vllm(folder, [PROMPTS, PROMPTS], NEW_TOKENS, **settings)
    expected = folders.greedy(folder, PROMPTS, NEW_TOKENS)
    assert first["tokens"] == expected
    assert again["tokens"] == expected
    assert min(again["cached"][1:]) >= 64
    assert (first["cuda_graphs"] > 0) == (not settings.get("enforce_eager", True))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("prefix", [False, True])
def test_half_precision_stays_near_the_best_token(
    tmp_path: Path, prefix: bool, head_dim: int
) -> None:
    """The kernels for Hopper read chunks of prompts. A chosen token's logit in single precision is
    below the best one by rounding alone; with other bands it is by 6 and more.
    """
    patterns = PREFIXES if prefix else None
    folder = folders.save(tmp_path, patterns=patterns, sinks=True, head_dim=head_dim)
    settings = {"dtype": "bfloat16", "gpu_memory_utilization": 0.05}
    runs = engine.generate_in_vllm(folder, [PROMPTS, PROMPTS], NEW_TOKENS, **settings)
    assert min(runs[1]["cached"][1:]) >= 64
    spa.hf.register()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for run in runs:
        for prompt, tokens in zip(PROMPTS, run["tokens"]):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            assert float((logits.max(1).values - chosen).max()) < 0.5
