"""The bands that a model runs now, whatever was done to it before."""

from __future__ import annotations

from typing import Any

from ..bands import BandPattern
from ..compat.huggingface import attention_name
from .config import NAME
from .decoder import attention_modules, plan_of, text_config_of
from .tensor_parallel import natural_pattern


def patterns(model: Any) -> list[BandPattern | None]:
    """The bands of each text layer as it runs now; None for a layer with other attention.

    This tells whether bands came through a load, a merge or a tool, without a forward pass:
    `spa.hf.patterns(loaded) == spa.hf.patterns(trained)`.

    Args:
        model: a causal language model of Transformers, also inside a PEFT model.

    Raises:
        ValueError: if it is something else.
    """
    text_config = text_config_of(model)
    modules = attention_modules(model, text_config)
    return [_running(modules.get(index)) for index in range(text_config.num_hidden_layers)]


def _running(module: Any) -> BandPattern | None:
    plan = None if module is None else plan_of(module)
    if plan is None or plan.pattern is None or attention_name(module.config) != NAME:
        return None
    return natural_pattern(module, plan.pattern)
