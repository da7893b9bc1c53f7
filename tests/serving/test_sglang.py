"""SGLang itself, on the CPU: Transformers' tokens, and refusals at start-up."""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from . import folders
from .sglang_engine import generate_in_sglang, start_error

pytestmark = [
    pytest.mark.serving,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("sglang") is None, reason="needs SGLang"),
]

NEW_TOKENS = 24
# Prompts within the span of 96 and beyond it.
PROMPTS = folders.prompts([5, 30, 150, 230])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "olmoe"])
def test_tokens_are_transformers_tokens(tmp_path: Path, family: str) -> None:
    """Four requests at once in chunks of 64, again from cached prefixes, with sinks."""
    # SGLang's OLMoE has as many key/value heads as query heads.
    shape = {"num_key_value_heads": 4} if family == "olmoe" else {}
    folder = folders.save(tmp_path, family, sinks=True, **shape)
    expected = folders.greedy(folder, PROMPTS, NEW_TOKENS)
    first, again = generate_in_sglang(folder, [PROMPTS, PROMPTS], NEW_TOKENS)
    assert first["tokens"] == again["tokens"] == expected
    assert first["cached"] == [0, 0, 0, 0]
    assert again["cached"] == [len(prompt) - 1 for prompt in PROMPTS]


def test_pages_and_mixed_steps_give_the_same(tmp_path: Path) -> None:
    """Pages of 16, prefixes, a dense layer, and chunks of prompts beside decoding."""
    folder = folders.save(tmp_path, patterns=(replace(folders.FIRST, prefix=5), None))
    (run,) = generate_in_sglang(
        folder, [PROMPTS], NEW_TOKENS, page_size=16, enable_mixed_chunk=True
    )
    assert run["tokens"] == folders.greedy(folder, PROMPTS, NEW_TOKENS)


def test_two_ranks_give_the_same_tokens(tmp_path: Path) -> None:
    """Tensor parallelism: each rank has its heads' bands and sinks; schedules overlap."""
    folder = folders.save(tmp_path, sinks=True)
    (run,) = generate_in_sglang(
        folder, [PROMPTS], NEW_TOKENS, tp_size=2, disable_overlap_schedule=False
    )
    assert run["tokens"] == folders.greedy(folder, PROMPTS, NEW_TOKENS)


def test_sglang_refuses_by_name(tmp_path: Path) -> None:
    """Each message says what is wrong; without the plugin SGLang does not know the model."""
    folder = folders.save(tmp_path / "banded")
    for settings, message in (
        ({"kv_cache_dtype": "fp8_e4m3"}, "`kv_cache_dtype` must be one of"),
        ({"attention_backend": "torch_native"}, "`attention_backend` must be 'spattention'"),
    ):
        assert message in start_error(folder, **settings)
    without_plugin = start_error(folder, {"SGLANG_PLUGINS": "none"})
    assert "'SpattentionLlamaForCausalLM' is not a registered model" in without_plugin
    stock = shutil.copytree(folder, tmp_path / "stock")
    folders.edit(stock, architectures=["LlamaForCausalLM"])
    assert "which would run it without its bands" in start_error(stock)
