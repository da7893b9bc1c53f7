"""vLLM itself, on the CPU: Transformers' tokens, freed blocks, and refusals at start-up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import spattention as spa

from . import engine, folders

pytest.importorskip("vllm")
pytestmark = [pytest.mark.serving, pytest.mark.timeout(900)]

NEW_TOKENS = 40
# One token alone, prompts within the span of 96 and prompts beyond it, whose first blocks are freed
# while they are read.
PROMPTS = folders.prompts([1, 70, 200, 300])


@pytest.mark.parametrize(
    ("family", "sinks"),
    [("llama", False), ("mistral", False), ("qwen3", True), ("olmoe", True), ("olmo3", True)],
)
def test_tokens_are_transformers_tokens(tmp_path: Path, family: str, sinks: bool) -> None:
    """Four requests at once in blocks of 16 and chunks of 64, again from cached prefixes."""
    folder = folders.save(tmp_path, family, sinks=sinks)
    expected = folders.greedy(folder, PROMPTS, NEW_TOKENS)
    request = {"runs": [PROMPTS, PROMPTS], "tokens": NEW_TOKENS, "settings": {}}
    first, again = engine.call("generate", folder, request)
    assert first["tokens"] == expected
    assert again["tokens"] == expected
    assert first["cached"] == [0, 0, 0, 0]
    assert again["cached"][0] == 0
    assert min(again["cached"][1:]) >= 64  # so the second run did read the first one's blocks


def test_bands_matter_to_the_tokens(tmp_path: Path) -> None:
    """The models of these tests give other tokens where bands are lost or exchanged."""
    folder = folders.save(tmp_path / "banded")
    exchanged = folders.save(tmp_path / "other", patterns=(folders.SECOND, folders.FIRST))
    tokens = folders.greedy(folder, PROMPTS, NEW_TOKENS)
    assert all(
        a != b for a, b in zip(tokens[1:], folders.greedy(exchanged, PROMPTS, NEW_TOKENS)[1:])
    )


def test_blocks_are_freed_by_class_of_heads(tmp_path: Path) -> None:
    """A long request holds the blocks that its heads' bands reach, and no others."""
    length, heads = 2048, 8
    pattern = spa.BandPattern.shared_local(heads, length, widths="geometric", local=64)
    sliding = spa.BandPattern.sliding_window(heads, length, 128)
    most = {}
    for name, bands in (("geometric", pattern), ("sliding", sliding)):
        shape = {"num_attention_heads": heads, "num_key_value_heads": heads}
        folder = folders.save(tmp_path / name, patterns=(bands, bands), **shape)
        settings = {"max_model_len": 4096, "enable_prefix_caching": False}
        request = {"runs": [folders.prompts([length])], "tokens": 8, "settings": settings}
        (run,) = engine.call("generate", folder, request)
        assert run["tokens"] == folders.greedy(folder, folders.prompts([length]), 8)
        most[name] = run["most_blocks"]
    print(json.dumps(most))
    assert most["sliding"] <= (128 + 64) / 16 + 2


@pytest.mark.parametrize(
    ("entries", "settings", "message"),
    [
        (
            {"architectures": ["LlamaForCausalLM"]},
            {},
            "`architectures` of a model with bands must be ['SpattentionLlamaForCausalLM']",
        ),
        (
            {"architectures": ["SpattentionGemma3ForCausalLM"]},
            {},
            "the families that spattention serves, got ['SpattentionGemma3ForCausalLM']",
        ),
        ({"spattention": None}, {}, "the folder has lost its bands"),
        ({"num_attention_heads": 2}, {}, "`pattern` has 4 heads but layer 0 of the model has 2"),
        (
            {},
            {"kv_cache_dtype": "fp8"},
            "`kv_cache_dtype` must be one of ('auto', 'float16', 'bfloat16', 'float32') for",
        ),
        (
            {},
            {"tensor_parallel_size": 3},
            "`tensor_parallel_size` must divide the model's 4 query heads, got 3",
        ),
        ({}, {}, None),
    ],
)
def test_bad_folders_and_settings_end_at_start_up(
    tmp_path: Path, entries: dict[str, Any], settings: dict[str, Any], message: str | None
) -> None:
    folder = folders.save(tmp_path)
    folders.edit(folder, **entries)
    error = engine.call("start", folder, {"settings": settings})
    if message is None:
        assert error is None
    else:
        assert message in error


def test_a_newer_section_ends_at_start_up(tmp_path: Path) -> None:
    folder = folders.save(tmp_path)
    section = json.loads((folder / "config.json").read_text())["spattention"]
    folders.edit(folder, spattention=section | {"version": 7})
    error = engine.call("start", folder, {"settings": {}})
    assert "`config.spattention` must have version 1 (the one this library writes), got 7" in error


def test_vllm_without_the_plugin_refuses_bands(tmp_path: Path) -> None:
    """vLLM's own registry does not know the name that a band model's folder gives."""
    folder = folders.save(tmp_path)
    error = engine.call("start", folder, {"settings": {}}, VLLM_PLUGINS="")
    assert "Model architectures ['SpattentionLlamaForCausalLM'] are not supported for now" in error


def test_the_plugin_leaves_stock_models_alone(tmp_path: Path) -> None:
    folder = folders.save(tmp_path)
    folders.edit(folder, architectures=["LlamaForCausalLM"], spattention=None)
    assert engine.call("start", folder, {"settings": {}}) is None
