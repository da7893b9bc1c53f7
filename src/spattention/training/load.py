"""The model of a recipe, and its tokenizer: fresh, pretrained, or from a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .. import baselines, hf, related
from ..choice import AttentionChoice, OtherAttention
from ..data.tokenizer import for_transformers, load_tokenizer
from ..data.training import TrainingData
from ..hf.config import read_section, remove_section
from ..models import SHAPES, Preset, build, count_parameters, preset
from .layers import is_stock, recipe_attention
from .recipe import Recipe

STATE_BYTES = 16  # of a parameter: float32 weight, gradient and two averages of AdamW


def check_memory(recipe: Recipe, device: torch.device, devices: int) -> None:
    """Raise ValueError if a preset cannot fit into the memory of its devices.

    Args:
        recipe: what is trained; a pretrained model is not looked at.
        device: one of them.
        devices: how many share the work; under "fsdp2" they share the state.
    """
    if recipe.model not in SHAPES:
        return
    total = count_parameters(_preset(recipe).config).total
    needed = STATE_BYTES * total
    if recipe.parallel == "fsdp2":  # each device makes all the weights before they are sharded
        needed = max(4 * total, needed // (recipe.shard_size or devices))
    there = _memory(device)
    if there is not None and needed > there:
        raise ValueError(
            f"`model`, `layers` and `vocabulary` must make a model that fits into the "
            f"{there / 2**30:,.1f} GiB of {device}; {recipe.model} with {recipe.layers or 'its'} "
            f"layers and {recipe.vocabulary or 'its'} entries has {total:,} parameters, which need "
            f"{needed / 2**30:,.1f} GiB in training"
        )


def _memory(device: torch.device) -> int | None:
    """Bytes of memory of a device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _preset(recipe: Recipe) -> Preset:
    return preset(
        recipe.model,
        vocab_size=recipe.vocabulary,
        context=recipe.context,
        num_layers=recipe.layers,
    )


def load_model(
    recipe: Recipe, data: TrainingData, device: torch.device
) -> tuple[PreTrainedModel, AttentionChoice]:
    """The float32 model that a recipe names, with its attention applied.

    Args:
        recipe: what is trained.
        data: what it is trained on; names the end of text, and bounds the vocabulary from below.
        device: where a preset's weights are made.

    Raises:
        ValueError: if model, attention and data do not go together.
    """
    if recipe.model in SHAPES:
        chosen = _preset(recipe)
        with device:  # weights are made where they are used
            model = build(chosen, pattern=None)
    else:
        model = _pretrained(recipe)
    config = model.config.get_text_config()
    if data.largest >= config.vocab_size:
        raise ValueError(
            f"`vocabulary` must be above the largest token of the data, {data.largest}, got "
            f"{config.vocab_size}"
        )
    section = read_section(config)
    if section is not None and section.sinks and not recipe.sinks:
        raise ValueError(
            f"`sinks` must be true: {recipe.model} was trained with sinks, which its other weights "
            'count on (`attention = "dense"` leaves them out); got false'
        )
    attention = _attention(recipe, recipe.attention, config)
    if not recipe.across_documents and isinstance(attention, OtherAttention):
        raise ValueError(
            f"`across_documents` must be true with {attention.name}, which knows no documents, "
            "got false"
        )
    attention.apply(model)
    if data.end_of_text is not None:
        model.config.eos_token_id = data.end_of_text
        if model.generation_config is not None:
            model.generation_config.eos_token_id = data.end_of_text
    return model, attention


def first_attention(recipe: Recipe, model: PreTrainedModel) -> AttentionChoice | None:
    """The attention of a recipe's first steps; None where it never changes."""
    if recipe.first_attention is None:
        return None
    return _attention(recipe, recipe.first_attention, model.config.get_text_config())


def _attention(recipe: Recipe, named: str | tuple[str, ...], config: Any) -> AttentionChoice:
    return recipe_attention(
        named,
        config.num_hidden_layers,
        config.num_attention_heads,
        recipe.context,
        sinks=recipe.sinks,
        all_bands=recipe.first_attention is not None,
    )


def _pretrained(recipe: Recipe) -> PreTrainedModel:
    hf.register()
    baselines.register()
    related.register()
    options: dict[str, Any] = {}
    try:
        if is_stock(recipe.attention):  # also of a model that had other attention
            config = AutoConfig.from_pretrained(recipe.model, trust_remote_code=False)
            remove_section(config)
            options = {"config": config, "attn_implementation": "sdpa"}
        model = AutoModelForCausalLM.from_pretrained(
            recipe.model, dtype=torch.float32, trust_remote_code=False, **options
        )
    except ImportError:
        raise
    except Exception as error:  # Transformers and safetensors raise many types for a damaged file
        raise ValueError(
            f"`model` must be one of {list(SHAPES)} or a pretrained model, got {recipe.model!r}: "
            f"{' '.join(str(error).split()) or type(error).__name__}"
        ) from error
    config = model.config.get_text_config()
    sizes = {"layers": config.num_hidden_layers, "vocabulary": config.vocab_size}
    for name, own in sizes.items():
        if getattr(recipe, name) not in (None, own):
            raise ValueError(
                f"`{name}` must be left out or {own}, which {recipe.model} has, got "
                f"{getattr(recipe, name)}"
            )
    if any(".experts." in name for name, _ in model.named_parameters()):
        model.set_experts_implementation("grouped_mm")
    # Some know no longest text.
    length = getattr(config, "max_position_embeddings", None)
    if length is not None and recipe.context > length:
        raise ValueError(f"`context` must be at most the model's {length}, got {recipe.context}")
    return model


def load_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Give a model the weights of a checkpoint, all of them.

    The Trainer's own loading is not strict, and passes over experts: they are saved one by one, as
    on the hub, and only `from_pretrained` joins them again.
    """
    hf.register()
    found = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, trust_remote_code=False
    )
    model.load_state_dict(found.state_dict())


def load_saved_tokenizer(data: TrainingData, context: int) -> PreTrainedTokenizerBase | None:
    """The data's tokenizer as it is saved beside the model; None where it is not known."""
    if data.tokenizer is None:
        return None
    return for_transformers(load_tokenizer(data.tokenizer), context, data.end_of_text)
