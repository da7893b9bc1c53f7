"""Weights that were saved by themselves, with `torch.save(model.state_dict())`.

PyTorch keeps notes beside the tensors of a state dict, one per module, and pickles them along. For
an attention module with bands (or a baseline) the note says which. So a file of weights alone
cannot be opened in a process that has not registered the kind, and its weights not be loaded into a
model without it. State dicts that stay in memory go anywhere; formats that hold tensors alone, such
as safetensors, have no place for notes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch

from ..compat.pytorch import state_dict_metadata

NOTE = "spattention"  # in the metadata of a module
REGISTERED: set[str] = set()  # kinds whose weights this process may open


@dataclass(frozen=True)
class Note:
    """The attention that a module's weights belong to.

    Attributes:
        kind: name of the attention kind.
        call: what makes it known to Transformers.
        text: its part of the section, as text.
        is_from_file: whether the weights were pickled since.
    """

    kind: str
    call: str
    text: str
    is_from_file: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        return call_register_before_loading, (self.kind, self.call, self.text)

    def __deepcopy__(self, memo: dict[int, Any]) -> Note:
        return self


def call_register_before_loading(kind: str, call: str, text: str) -> Note:
    """Make the note again. PyTorch names this function where it does not know it."""
    if kind not in REGISTERED:
        raise ValueError(f"{kind}: {call} must be called before these weights are loaded")
    return Note(kind, call, text, is_from_file=True)


def allow_weights(kind: str) -> None:
    """Let this process open weights of a kind."""
    REGISTERED.add(kind)
    torch.serialization.add_safe_globals([call_register_before_loading])


def note_weights(module: Any, make_note: Callable[[Any], Note | None]) -> None:
    """Have an attention module note in state dicts what it does, and look for it in those that it
    loads.

    Args:
        module: the attention module; a second call replaces the first.
        make_note: the note of a module, None for stock attention.
    """
    if not hasattr(module, "_spattention_note"):
        module.register_state_dict_post_hook(_write)
    module._spattention_note = make_note


def _write(module: Any, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    note = module._spattention_note(module)
    if note is not None:
        local_metadata[NOTE] = note


def checking_notes(load_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `load_state_dict` of Transformers' models."""

    @wraps(load_state_dict)
    def load(self: Any, state_dict: Any, *args: Any, **keywords: Any) -> Any:
        for name, metadata in state_dict_metadata(state_dict).items():
            note = metadata.get(NOTE)
            if note is not None and note.is_from_file:
                _check(self, name, note)
        return load_state_dict(self, state_dict, *args, **keywords)

    return load


def _check(model: Any, name: str, note: Note) -> None:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return  # weights of another model, which PyTorch refuses
    make_note = getattr(module, "_spattention_note", None)
    found = None if make_note is None else make_note(module)
    if found is None or (found.kind, found.text) != (note.kind, note.text):
        raise ValueError(
            f"`state_dict` must be loaded into a model with the `config.{note.kind}` that its "
            f"weights were saved from, {note.text} in {name}, got "
            f"{'none' if found is None else f'{found.kind}: {found.text}'}"
        )
