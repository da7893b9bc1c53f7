"""OLMoE presets: Transformers configs with a default pattern.

chosen = preset("olmoe-tiny", vocab_size=2048, context=512)
model = build(chosen)                    # shared_local bands of geometric widths
dense = build(chosen, pattern=None)      # the same model without them
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

from .bands import BandPattern
from .hf import apply
from .scalars import int_at_least


@dataclass(frozen=True)
class Shape:
    """Sizes of an OLMoE model; widths and lengths in features and tokens.

    Attributes:
        hidden: width of the residual stream.
        layers: decoder layers.
        heads: attention heads, of width `hidden // heads`.
        experts: experts per layer.
        experts_per_token: experts that each token visits.
        expert_width: hidden width of one expert.
        vocabulary: entries of the vocabulary.
        context: longest input; also the span of the default pattern.
    """

    hidden: int
    layers: int
    heads: int
    experts: int
    experts_per_token: int
    expert_width: int
    vocabulary: int
    context: int


SHAPES = {
    # One expert that every token visits: plain transformers with gated feed-forward layers.
    "small-512": Shape(512, 8, 8, 1, 1, 1408, 50304, 1024),
    "paper-small": Shape(1024, 8, 8, 1, 1, 2816, 50304, 1024),
    "olmoe-tiny": Shape(128, 4, 8, 8, 2, 128, 4096, 512),
    # The paper gives no table of sizes; these reproduce its 1.75 billion parameters.
    "olmoe-0.25b-1.75b": Shape(1024, 8, 8, 64, 8, 1024, 50304, 1024),
    # OLMoE-1B-7B-0924. `OlmoeConfig()` differs: its expert width defaults to 2048.
    "olmoe-1b-7b": Shape(2048, 16, 16, 64, 8, 1024, 50304, 4096),
}
# What configurations call the number of experts that a token chooses from.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


class Preset(NamedTuple):
    """The config of a model and its default bands, `shared_local` with geometric widths.

    These ended at lower losses than uniform ones at contexts of 2,048 to 16,384 (docs/evidence.md).
    """

    config: OlmoeConfig
    pattern: BandPattern


class ParameterCount(NamedTuple):
    """The parameters of a model: all of them, and those that one token uses."""

    total: int
    active: int


def preset(
    name: str,
    *,
    vocab_size: int | None = None,
    context: int | None = None,
    num_layers: int | None = None,
    num_heads: int | None = None,
) -> Preset:
    """The preset of this name: "small-512", "paper-small", "olmoe-tiny", "olmoe-0.25b-1.75b" or
    "olmoe-1b-7b".

    Args:
        name: the preset's name.
        vocab_size: entries of the vocabulary, instead of the preset's.
        context: longest input in tokens and span of the pattern, instead of the preset's.
        num_layers: decoder layers, instead of the preset's.
        num_heads: attention heads, instead of the preset's; must divide the hidden width.

    Returns:
        A fresh config, without special tokens and without dropout, and its pattern.

    Raises:
        ValueError: if the name is unknown or a size is not a positive integer that fits.
    """
    if name not in SHAPES:
        raise ValueError(f"`name` must be one of {list(SHAPES)}, got {name!r}")
    shape = SHAPES[name]
    vocabulary = _size("vocab_size", vocab_size, shape.vocabulary)
    length = _size("context", context, shape.context)
    layers = _size("num_layers", num_layers, shape.layers)
    heads = _size("num_heads", num_heads, shape.heads)
    if shape.hidden % heads:
        raise ValueError(
            f"`num_heads` must divide the hidden width {shape.hidden} of {name}, got {heads}"
        )
    config = OlmoeConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.expert_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=length,
        num_experts=shape.experts,
        num_experts_per_tok=shape.experts_per_token,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attention_dropout=0.0,
        # These belong to a tokenizer, which is chosen later.
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Preset(config, BandPattern.shared_local(heads, length, widths="geometric"))


def build(
    chosen: Preset,
    *,
    pattern: BandPattern | str | None = "preset",
    sinks: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Build a model with fresh weights from PyTorch's random state.

    Args:
        chosen: a result of `preset`.
        pattern: "preset" for the preset's own, None for dense attention, or any other pattern.
        sinks: True gives layers with a pattern attention sinks.
        dtype: dtype of the weights.

    Returns:
        An `OlmoeForCausalLM` in training mode, as Transformers builds it.
    """
    if isinstance(pattern, str) and pattern != "preset":
        raise ValueError(f'`pattern` must be a BandPattern, None or "preset", got {pattern!r}')
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(chosen.config),  # the model's own: `apply` writes into it
        attn_implementation="sdpa",
        # As fast as the loop over experts on the CPU, faster on a GPU, and it compiles; no float64.
        experts_implementation="eager" if dtype == torch.float64 else "grouped_mm",
        dtype=dtype,
    )
    bands = chosen.pattern if isinstance(pattern, str) else pattern
    return model if bands is None else apply(model, bands, sinks=sinks)


def count_parameters(config: OlmoeConfig) -> ParameterCount:
    """Count the parameters on the meta device, without allocating them."""
    with torch.device("meta"):
        return parameters_of(AutoModelForCausalLM.from_config(copy.deepcopy(config)))


def parameters_of(model: Any) -> ParameterCount:
    """Count the parameters of any model of Transformers; a token visits some of its experts."""
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    config = model.config.get_text_config()
    if not experts:
        return ParameterCount(total, total)
    count = next((found for name in EXPERTS if (found := getattr(config, name, None))), None)
    if count is None:
        raise ValueError(f"the model's config must name its experts, one of {', '.join(EXPERTS)}")
    return ParameterCount(total, total - experts * (count - config.num_experts_per_tok) // count)


def _size(name: str, given: int | None, default: int) -> int:
    return default if given is None else int_at_least(name, given, 1)
