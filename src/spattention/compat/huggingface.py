"""Private symbols of Transformers (seen in 5.17 and 5.23), PEFT (0.21) and Accelerate (1.15)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, masking_utils
from transformers.fusion_mapping import _FUSION_REGISTRY, ModuleFusionSpec

# Entries of config.json that name the attention implementation: Transformers reads both.
ATTENTION_KEYS = ("attn_implementation", "_attn_implementation")

# The method of PEFT's tuners below `unload` and `merge_and_unload`, which some tuners override.
UNLOAD = "_unload_and_optionally_merge"


def attention_name(config: Any) -> str:
    """The attention implementation that a config runs; configs have no public getter."""
    return config._attn_implementation


def set_attention_name(config: Any, name: str) -> None:
    """Set the implementation of one config, without its parts and without the checks of
    `set_attn_implementation`, which is a method of models.
    """
    config._attn_implementation_internal = name


def wrap_attention_choice(wrap: Callable[[Callable[..., str]], Callable[..., str]]) -> None:
    """Wrap the method by which a model that is built takes the implementation of its config, or
    chooses one where that is None.
    """
    PreTrainedModel._check_and_adjust_attn_implementation = wrap(
        PreTrainedModel._check_and_adjust_attn_implementation
    )


def follows_attention_interface(model: PreTrainedModel) -> bool:
    """True if attention can be replaced; `set_attn_implementation` only warns where it cannot."""
    return model._can_set_attn_implementation()


def decoder_layer_names(model: PreTrainedModel) -> set[str]:
    """Class names of the decoder layers, as Accelerate and FSDP read them."""
    return set(model._no_split_modules or ())


def keep_initial_value(parameter: torch.nn.Parameter) -> None:
    """Have Transformers keep a parameter as it is where a checkpoint lacks it."""
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def wrap_module_loading(wrap: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    """Wrap the method by which PyTorch loads each module of a state dict, for Transformers' models:
    `load_state_dict` of a module that wraps a model does not call that of the model.
    """
    PreTrainedModel._load_from_state_dict = wrap(PreTrainedModel._load_from_state_dict)


def wrap_missing_keys_check(wrap: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    """Wrap what Transformers does with weights that a checkpoint lacks: it only warns, and leaves
    parameters that it does not know uninitialised.
    """
    PreTrainedModel._adjust_missing_and_unexpected_keys = wrap(
        PreTrainedModel._adjust_missing_and_unexpected_keys
    )


def register_fusion(name: str) -> None:
    """Have configs accept `fusion_config[name]`; processes that do not know the name refuse it."""
    _FUSION_REGISTRY[name] = ModuleFusionSpec()


def adapters_disabled(wrapper: Any) -> bool:
    """True where a PEFT `AuxiliaryTrainingWrapper` uses the base model's weights."""
    return wrapper._disable_adapters


def set_adapters_disabled(wrapper: Any, disabled: bool) -> None:
    """Set that without PEFT's `enable_adapters`, which also changes what requires gradients."""
    wrapper._disable_adapters = disabled


def offload_hook(module: Any) -> Any:
    """The hook of Accelerate on a module that it offloads, or None."""
    return getattr(module, "_hf_hook", None)


def download_keywords(model: Any, keywords: dict[str, Any]) -> dict[str, Any]:
    """Keywords of PEFT's `load_adapter` that say where an adapter is; the rest is for loading."""
    return model._split_kwargs(dict(keywords))[0]


def to_device(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs on the device of a Trainer, as its own `prediction_step` does it."""
    return trainer._prepare_inputs(inputs)


@contextmanager
def packing_known(packed: bool) -> Iterator[None]:
    """Have Transformers take rows without a cache for packed documents, or for one text each.

    It reads `position_ids` to tell, which waits for the GPU. In the capture of a CUDA graph it
    reads nothing, takes all rows for packed ones, and (5.17) makes masks that attention does not
    need. Here a capture makes the masks of any other pass.
    """

    def indices(position_ids: torch.Tensor) -> torch.Tensor | None:
        if not packed:
            return None
        jumps = position_ids.diff(prepend=position_ids[:, :1] - 1, dim=-1) != 1
        return jumps.cumsum(-1)

    before = masking_utils.find_packed_sequence_indices, masking_utils.is_tracing
    masking_utils.find_packed_sequence_indices = indices
    masking_utils.is_tracing = lambda tensor=None: False
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices, masking_utils.is_tracing = before
