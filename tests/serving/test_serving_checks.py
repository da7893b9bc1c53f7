"""One clear line for what cannot be served, before anything is loaded."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers

import spattention as spa
from spattention.hf.config import section_of
from spattention.serving.checks import (
    FAMILIES,
    check_architectures,
    check_cache_dtype,
    check_group,
    check_ranks,
)

PATTERN = spa.BandPattern.exclusive(4, 32)


def config(section: Any = None) -> Any:
    made = transformers.LlamaConfig(
        num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2
    )
    if section is not None:
        made.spattention = section
    return made


def section(pattern: spa.BandPattern = PATTERN, **entries: Any) -> dict[str, Any]:
    return dict(section_of([pattern, None], False)) | entries


@pytest.mark.parametrize("family", FAMILIES)
def test_served_families_pass(family: str) -> None:
    check_architectures(config(section()), [f"Spattention{family}"])
    check_architectures(config(), [family])


@pytest.mark.parametrize(
    ("given", "architectures", "message"),
    [
        (
            section(),
            ["LlamaForCausalLM"],
            "`architectures` of a model with bands must be ['SpattentionLlamaForCausalLM'], got "
            "['LlamaForCausalLM'], which would run it without its bands",
        ),
        (section(), ["SpattentionGemma3ForCausalLM"], "the families that spattention serves, got"),
        (section(), ["GptOssForCausalLM"], "the families that spattention serves, got"),
        (section(), ["SpattentionLlamaForCausalLM", "LlamaForCausalLM"], "must be one of"),
        (section(), [], "must be one of"),
        (None, ["SpattentionLlamaForCausalLM"], "the folder has lost its bands"),
        (
            section(version=2),
            ["SpattentionLlamaForCausalLM"],
            "`config.spattention` must have version 1 (the one this library writes), got 2",
        ),
        (
            section(spa.BandPattern.exclusive(8, 32)),
            ["SpattentionLlamaForCausalLM"],
            "`pattern` has 8 heads but layer 0 of the model has 4",
        ),
        (section(layers=[0]), ["SpattentionLlamaForCausalLM"], "one entry of `layers` per text"),
        ([], ["SpattentionLlamaForCausalLM"], "must be a mapping, got list"),
    ],
)
def test_other_folders_are_refused_by_name(
    given: Any, architectures: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        check_architectures(config(given), architectures)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e4m3", "fp8_e5m2", "int8_per_token_head", "nvfp4"])
def test_a_quantized_cache_is_refused_by_name(dtype: str) -> None:
    with pytest.raises(ValueError, match=rf"`kv_cache_dtype` must be one of .*, got '{dtype}'"):
        check_cache_dtype(dtype)


def test_a_cache_has_the_dtype_of_its_model() -> None:
    check_cache_dtype("auto", torch.bfloat16)
    check_cache_dtype("bfloat16", torch.bfloat16)
    message = "`kv_cache_dtype` must be 'auto' or the model's 'float32' for spattention, got 'bf"
    with pytest.raises(ValueError, match=message):
        check_cache_dtype("bfloat16", torch.float32)


def test_tensor_parallel_sizes_must_deal_whole_heads() -> None:
    for ranks in (1, 2, 4, 8, 16):
        check_ranks(32, 8, ranks)
    with pytest.raises(ValueError, match="must divide the model's 32 query heads, got 3"):
        check_ranks(32, 8, 3)
    with pytest.raises(ValueError, match="must divide the model's 6 key/value heads or be a mul"):
        check_ranks(24, 6, 4)


def test_vllm_missing_is_named() -> None:
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "try:\n    import spattention.vllm\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "spattention[vllm]" in done.stdout


def test_classes_of_one_layer_share_no_step() -> None:
    """They run side by side, and would race for what the step makes when first asked."""
    check_group(["layers.0.attn.class_1", "layers.1.attn.class_0"])
    with pytest.raises(ValueError, match="must be of different layers"):
        check_group(["layers.0.attn.class_0", "layers.1.attn.class_0", "layers.0.attn.class_2"])
