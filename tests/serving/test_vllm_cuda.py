"""vLLM on a GPU, decoding by kernels inside CUDA graphs, against Transformers on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

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
    patterns = PREFIXES if prefix else None
    folder = folders.save(tmp_path, patterns=patterns, sinks=True, **SHAPE)
    settings = MODES[mode] | {"gpu_memory_utilization": 0.05}
    first, again = engine.generate_in_vllm(folder, [PROMPTS, PROMPTS], NEW_TOKENS, **settings)
    expected = folders.greedy(folder, PROMPTS, NEW_TOKENS)
    assert first["tokens"] == expected
    assert again["tokens"] == expected
    assert min(again["cached"][1:]) >= 64
    assert (first["cuda_graphs"] > 0) == (mode != "eager")
