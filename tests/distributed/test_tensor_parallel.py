"""Tensor parallelism by Transformers' plans (gloo, CPU), and heads dealt to ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import launch

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_parallel_ranks_equal_one(ranks, tmp_path):
    """Llama, Qwen3 and OLMoE with bands before and after loading, caches, dealt heads, saving."""
    shown = launch(ranks, HERE / "tensor_parallel.py", tmp_path)
    assert f"{ranks} ranks equals one" in shown
