"""Have `torch.distributed.checkpoint` read weights into the model that they were saved from.

It reads the tensors that a state dict asks for, and no others. So a dense model would never meet
the marks of a checkpoint with bands, and one with bands asks a checkpoint without marks for them.

Imported as soon as both the planner and a registered kind are there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from .weights import MARK, is_mark, mark_text, refuse_changed_mark


def _checking_marks(set_up_planner: Callable[..., None]) -> Callable[..., None]:
    """Wrap the method by which a planner meets a state dict and what the checkpoint holds."""

    @wraps(set_up_planner)
    def set_up(
        self: Any, state_dict: Any, metadata: Any = None, *args: Any, **keywords: Any
    ) -> None:
        set_up_planner(self, state_dict, metadata, *args, **keywords)
        saved = set() if metadata is None else set(metadata.state_dict_metadata)
        asked = set(self.state_dict)
        for name in sorted(filter(is_mark, saved - asked)):
            module = name.removesuffix(MARK)
            if any(other.startswith(module) for other in asked):
                raise ValueError(
                    "`state_dict` must be that of a model with the attention that the checkpoint "
                    f"was saved from, which has {name}, got one without; give it a tensor of that "
                    "name if that is meant"
                )
        for name in sorted(filter(is_mark, asked)):
            sinks = f"{name.removesuffix(MARK)}sinks"
            if sinks in saved - asked:
                raise ValueError(
                    "`state_dict` must have the sinks that the checkpoint holds, got no "
                    f"{sinks}: apply the bands with `sinks=True` first"
                )
        # A dense model's checkpoint, or an earlier version's, has none, as other ways of loading.
        unmarked = set(filter(is_mark, asked - saved))
        if metadata is not None and unmarked:
            kept = {name: each for name, each in self.state_dict.items() if name not in unmarked}
            self.state_dict = kept
        marks = filter(is_mark, self.state_dict)
        self.spattention_marks = {name: mark_text(self.state_dict[name]) for name in marks}

    return set_up


def _reading_marks_first(create_local_plan: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the method that says what is read: other bands are noticed before weights change."""

    @wraps(create_local_plan)
    def create(self: Any) -> Any:
        plan = create_local_plan(self)
        items = sorted(plan.items, key=lambda item: not is_mark(item.dest_index.fqn))
        return replace(plan, items=items)

    return create


def _comparing_marks(commit_tensor: Callable[..., None]) -> Callable[..., None]:
    """Wrap the method that follows the reading of each tensor."""

    @wraps(commit_tensor)
    def commit(self: Any, read_item: Any, tensor: torch.Tensor) -> None:
        commit_tensor(self, read_item, tensor)
        name = read_item.dest_index.fqn
        before = getattr(self, "spattention_marks", {}).get(name)
        if before is not None:
            refuse_changed_mark(name, before, mark_text(tensor))

    return commit


for name, wrap in (
    ("set_up_planner", _checking_marks),
    ("create_local_plan", _reading_marks_first),
    ("commit_tensor", _comparing_marks),
):
    setattr(DefaultLoadPlanner, name, wrap(getattr(DefaultLoadPlanner, name)))
