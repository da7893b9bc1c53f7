"""Have `torch.distributed.checkpoint` read weights into the model that they were saved from.

It reads the tensors that a state dict asks for, and no others. So a dense model would never meet
the marks of a checkpoint with bands, and one with bands asks a checkpoint without marks for them.

Imported as soon as both the planner and a registered kind are there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from .weights import MARK, is_mark


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
        # A dense model's checkpoint, or an earlier version's, has none, as other ways of loading.
        unmarked = set(filter(is_mark, asked - saved))
        if metadata is not None and unmarked:
            kept = {name: each for name, each in self.state_dict.items() if name not in unmarked}
            self.state_dict = kept

    return set_up


setattr(  # noqa: B010
    DefaultLoadPlanner, "set_up_planner", _checking_marks(DefaultLoadPlanner.set_up_planner)
)
