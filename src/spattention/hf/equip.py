"""Equip one attention module with its plan."""

from __future__ import annotations

import json
from typing import Any

from ..compat.pytorch import has_pre_hook
from .cache_guard import before_forward
from .config import NAME
from .decoder import LayerPlan, has_sinks, plan_of
from .parallel_guard import guard_parallel
from .sinks import new_sinks
from .tensor_parallel import natural_pattern
from .weights import Note, note_weights

CALL = "spattention.hf.register()"  # named in what a process without it reads


def equip(module: Any, plan: LayerPlan) -> None:
    """Give an attention module its plan, its sinks, and the hooks that guard both."""
    had_sinks = has_sinks(module)
    if had_sinks and not plan.sinks:
        del module.sinks
    if plan.sinks and not had_sinks:
        assert plan.pattern is not None
        module.sinks = new_sinks(module, plan.pattern.num_heads)
    module.spattention = plan
    if not has_pre_hook(module, before_forward):
        module.register_forward_pre_hook(before_forward, with_kwargs=True)
    guard_parallel(module)
    note_weights(module, _note)


def _note(module: Any) -> Note | None:
    plan = plan_of(module)
    if plan is None or plan.pattern is None:
        return None
    pattern = natural_pattern(module, plan.pattern)  # as weights are written, dealt or not
    meaning = {name: value for name, value in pattern.to_dict().items() if name != "recipe"}
    return Note(NAME, CALL, json.dumps(meaning))
