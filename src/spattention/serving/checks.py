"""Checks of a model folder and an engine's settings, before anything is loaded.

Each message is one line that names the setting, the rule and the value given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..bands import BandPattern
from ..hf.config import NAME, Section, read_section
from ..hf.section import ARCHITECTURE_PREFIX

# Families whose band models can be served, by the name that Transformers gives their class.
FAMILIES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Olmo3ForCausalLM",
    "OlmoeForCausalLM",
    "Qwen3ForCausalLM",
)
# SGLang 0.5.23 reads another base of OLMo 3's rotary embedding than Transformers 5 writes.
SGLANG_FAMILIES = tuple(family for family in FAMILIES if family != "Olmo3ForCausalLM")
BACKEND = "spattention"  # SGLang's name for this library's attention
PLAIN_CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32")


def check_architectures(
    text_config: Any, architectures: Sequence[str], families: Sequence[str] = FAMILIES
) -> None:
    """A folder with bands names a band model that can be served, and no other folder does.

    Args:
        text_config: the Transformers config of the folder's text decoder.
        architectures: the names that the engine would build.
        families: those that the engine serves.

    Raises:
        ValueError: if an engine would run the model without its bands, or without knowing them.
    """
    named = [name for name in architectures if name.startswith(ARCHITECTURE_PREFIX)]
    if getattr(text_config, NAME, None) is None:
        if named:
            raise ValueError(
                f"`config.{NAME}` must be there for the architecture {named[0]}, got none: the "
                "folder has lost its bands; restore the config.json that it was saved with"
            )
        return
    served = [ARCHITECTURE_PREFIX + family for family in families]
    if not named and architectures and architectures[0] in families:
        raise ValueError(
            f"`architectures` of a model with bands must be "
            f"['{ARCHITECTURE_PREFIX}{architectures[0]}'], got {list(architectures)}, which would "
            "run it without its bands: load and save the folder again with spattention"
        )
    if list(architectures) != named or len(named) != 1 or named[0] not in served:
        raise ValueError(
            f"`architectures` of a model with bands must be one of {served}, the families that "
            f"spattention serves, got {list(architectures)}"
        )
    section_for(text_config)


def section_for(text_config: Any) -> Section:
    """The folder's section, each pattern checked against the model's heads."""
    section = read_section(text_config)
    assert section is not None
    heads = text_config.num_attention_heads
    for layer, pattern in enumerate(section.layer_patterns):
        if pattern is not None and pattern.num_heads != heads:
            raise ValueError(
                f"`pattern` has {pattern.num_heads} heads but layer {layer} of the model has "
                f"{heads}"
            )
    return section


def check_cache_dtype(cache_dtype: str, model_dtype: Any = None) -> None:
    """Keys and values are stored as they are, in the model's dtype where that is known."""
    if cache_dtype not in PLAIN_CACHE_DTYPES:
        raise ValueError(
            f"`kv_cache_dtype` must be one of {PLAIN_CACHE_DTYPES} for spattention, which reads "
            f"keys and values unquantized, got {cache_dtype!r}"
        )
    own = str(model_dtype).removeprefix("torch.")
    if model_dtype is not None and cache_dtype not in ("auto", own):
        raise ValueError(
            f"`kv_cache_dtype` must be 'auto' or the model's {own!r} for spattention, got "
            f"{cache_dtype!r}"
        )


def check_ranks(num_heads: int, num_kv_heads: int, ranks: int) -> None:
    """Tensor-parallel ranks get whole groups of heads."""
    if num_heads % ranks:
        raise ValueError(
            f"`tensor_parallel_size` must divide the model's {num_heads} query heads, got {ranks}"
        )
    if num_kv_heads % ranks and ranks % num_kv_heads:
        raise ValueError(
            f"`tensor_parallel_size` must divide the model's {num_kv_heads} key/value heads or be "
            f"a multiple of them, got {ranks}"
        )


def check_group(layer_names: Sequence[str]) -> None:
    """Classes of one layer run side by side, so they must not share what a step makes when first
    asked. Those of different layers may.

    Args:
        layer_names: vLLM's names of the classes that share one description of a step.
    """
    layers = [name.rpartition(".")[0] for name in layer_names]
    if len(set(layers)) < len(layers):
        raise ValueError(
            "`layer_names` of a cache group must be of different layers for spattention, got "
            f"{list(layer_names)}"
        )


def banded(section: Section) -> dict[int, BandPattern]:
    """The patterns by layer, without the layers that keep their own attention."""
    return {i: pattern for i, pattern in enumerate(section.layer_patterns) if pattern is not None}
