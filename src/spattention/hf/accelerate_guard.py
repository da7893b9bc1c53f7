"""Have Accelerate load checkpoints into the model that they were saved from, or refuse them.

With a `device_map` it sets one tensor after the other, by no method of the model: it passes over
tensors that have no place there, and leaves on the meta device what a checkpoint lacks.

Imported as soon as both Accelerate and a registered kind are there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from types import SimpleNamespace
from typing import Any

from accelerate.utils import modeling

from .import_hooks import replace_everywhere
from .section import KINDS
from .weights import is_mark, refill_marks, refuse_other_mark


@dataclass(frozen=True)
class _Loading:
    """A checkpoint that is being loaded.

    Attributes:
        model: that it goes into.
        found: names of the tensors in its files so far.
    """

    model: Any
    found: set[str] = field(default_factory=set)


_LOADING: ContextVar[_Loading | None] = ContextVar("spattention_loading", default=None)


def _checking_file(load_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the function that reads one file of a checkpoint."""

    @wraps(load_state_dict)
    def load(*args: Any, **keywords: Any) -> Any:
        weights = load_state_dict(*args, **keywords)
        loading = _LOADING.get()
        if loading is not None:
            loading.found.update(weights)
            for name in filter(is_mark, weights):
                refuse_other_mark(loading.model, name, weights[name])
        return weights

    return load


def _checking_model(load_checkpoint: Callable[..., None]) -> Callable[..., None]:
    """Wrap `load_checkpoint_in_model`."""

    @wraps(load_checkpoint)
    def load(model: Any, *args: Any, **keywords: Any) -> None:
        loading = _Loading(model)
        token = _LOADING.set(loading)
        try:
            load_checkpoint(model, *args, **keywords)
        finally:
            _LOADING.reset(token)
        tensors = (*model.named_parameters(), *model.named_buffers())
        empty = {name for name, tensor in tensors if tensor.device.type == "meta"}
        # Files of earlier versions hold none, and buffers of offloaded modules must not wait.
        refill_marks(model, filter(is_mark, empty))
        names = {name for name, _ in tensors}
        # Sinks may start at 0 beside weights of a dense model, which have no marks.
        wanted = names if any(map(is_mark, loading.found)) else empty
        info = SimpleNamespace(
            missing_keys=wanted - loading.found,
            unexpected_keys=loading.found - names,
            mismatched_keys=(),
        )
        for kind in KINDS.values():
            if kind.check_weights is not None:
                kind.check_weights(model, info)

    return load


replace_everywhere("load_state_dict", modeling, _checking_file(modeling.load_state_dict))
checked = _checking_model(modeling.load_checkpoint_in_model)
replace_everywhere("load_checkpoint_in_model", modeling, checked)
