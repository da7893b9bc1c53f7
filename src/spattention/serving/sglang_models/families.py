"""SGLang's own models, whose attention layers carry bands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.models.llama import LlamaForCausalLM
from sglang.srt.models.mistral import MistralForCausalLM
from sglang.srt.models.olmoe import OlmoeForCausalLM
from sglang.srt.models.qwen3 import Qwen3ForCausalLM
from sglang.srt.runtime_context import attention_backends, get_parallel
from torch import Tensor

from ..checks import BACKEND, section_for
from ..head_classes import rank_pattern
from ..marks import without_marks
from ..sglang_backend import LayerBands

SINKS = "sinks"  # the parameter of an attention module, as Transformers' models have it


def give_bands(model: torch.nn.Module, config: Any) -> None:
    """Give every attention layer that has a pattern its bands, and its sinks if there are any."""
    section = section_for(config)
    check_backends()
    ranks, rank = get_parallel().attn_tp_size, get_parallel().attn_tp_rank
    owners: list[tuple[Any, Any]] = [
        (module, module.attn)
        for module in model.modules()
        if isinstance(getattr(module, "attn", None), RadixAttention)
    ]
    assert owners, "SGLang's model has no attention layers of the expected form"
    for owner, attention in owners:
        check_layer(attention)
        pattern = section.layer_patterns[attention.layer_id]
        if pattern is None:
            check_own(attention.layer_id, config)
            continue
        pattern = rank_pattern(pattern, ranks, rank)
        if pattern.num_heads != attention.tp_q_head_num:
            raise ValueError(
                f"layer {attention.layer_id} must have {pattern.num_heads} query heads on each of "
                f"{ranks} ranks, got {attention.tp_q_head_num} from SGLang"
            )
        sinks = None
        if section.sinks:
            # Not a number until it is loaded, so that missing weights show.
            start = torch.full((pattern.num_heads,), torch.nan, dtype=torch.float32)
            sinks = torch.nn.Parameter(start, requires_grad=False)
            owner.register_parameter(SINKS, sinks)
        attention.bands = LayerBands(pattern, sinks)


def check_backends() -> None:
    """SGLang attends by this library alone, since others ignore bands; raises `ValueError`."""
    for name, given in zip(("prefill", "decode"), attention_backends()):
        if given != BACKEND:
            raise ValueError(
                f"`{name}_attention_backend` must be {BACKEND!r} for a model with bands, got "
                f"{given!r}"
            )


def check_layer(attention: Any) -> None:
    """A layer that bands can take over; raises `ValueError` for other forms of attention."""
    for name, given, wanted in (
        ("attn_type", attention.attn_type, AttentionType.DECODER),
        ("is_cross_attention", attention.is_cross_attention, False),
        ("logit_cap", attention.logit_cap, 0.0),
        ("sliding_window_size", attention.sliding_window_size, -1),
        ("use_irope", attention.use_irope, False),
    ):
        if given != wanted:
            raise ValueError(f"`{name}` of a layer must be {wanted!r} for spattention, got {given}")


def check_own(layer: int, config: Any) -> None:
    """A layer without a pattern is dense, in the folder as in SGLang; raises `ValueError`."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window if kinds is None else kinds[layer] != "full_attention":
        raise ValueError(
            f"layer {layer} must have a pattern, since SGLang's model ignores its window of "
            f"{window} tokens"
        )


class Banded:
    """Mixed into a model class of SGLang: its attention layers get their bands."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(config, quant_config=quant_config, prefix=prefix)  # type: ignore[call-arg]
        give_bands(self, config)  # type: ignore[arg-type]
        self._section = section_for(config)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        """Load weights; their marks must be those of the config's bands."""
        parameters = {
            name: parameter
            for name, parameter in self.named_parameters()  # type: ignore[attr-defined]
            if name.endswith(f".{SINKS}")
        }
        unmarked = without_marks(weights, self._section)
        loaded = super().load_weights(_without_own(unmarked, parameters))  # type: ignore[misc]
        missing = [name for name, sinks in parameters.items() if bool(sinks.isnan().any())]
        if missing:
            raise ValueError(f"the folder's weights must hold numbers for {missing[0]}, got none")
        return loaded


def _without_own(
    weights: Iterable[tuple[str, Tensor]], parameters: dict[str, torch.nn.Parameter]
) -> Iterator[tuple[str, Tensor]]:
    """The weights that SGLang's model knows; sinks are loaded on the way, this rank's part."""
    for name, weight in weights:
        sinks = parameters.get(name)
        if sinks is not None:
            here, rank = sinks.shape[0], get_parallel().attn_tp_rank
            sinks.data.copy_(weight[rank * here : (rank + 1) * here])
        elif not name.endswith(f".{SINKS}"):
            yield name, weight


class SpattentionLlamaForCausalLM(Banded, LlamaForCausalLM):
    pass


class SpattentionMistralForCausalLM(Banded, MistralForCausalLM):
    pass


class SpattentionQwen3ForCausalLM(Banded, Qwen3ForCausalLM):
    pass


class SpattentionOlmoeForCausalLM(Banded, OlmoeForCausalLM):
    pass


# SGLang's registry looks for this name.
EntryClass = [
    SpattentionLlamaForCausalLM,
    SpattentionMistralForCausalLM,
    SpattentionOlmoeForCausalLM,
    SpattentionQwen3ForCausalLM,
]
