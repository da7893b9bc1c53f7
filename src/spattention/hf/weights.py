"""Weights that were saved by themselves, such as `torch.save(model.state_dict())`.

PyTorch keeps notes beside the tensors of a state dict, one per module, and pickles them along. For
an attention module with bands (or a baseline) the note says which. So a file of weights alone
cannot be opened in a process that has not registered the kind, and its weights not be loaded into a
model without it.

Formats that hold tensors alone, such as safetensors, have no place for notes. For them each such
module also has a buffer, the mark: a text that names the call, as float32, because programs average
state dicts as if all tensors were. Strict loading refuses it as unexpected, in any process. State
dicts that stay in memory go anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch

from ..compat.huggingface import attention_name
from ..compat.pytorch import copy_state_dict, state_dict_metadata
from .sinks import execution_device

NOTE = "spattention"  # in the metadata of a module
MARK = "spattention_mark"  # the buffer of a module
LIVE = "spattention_live"  # attribute of a mark in a state dict that was never in a file
REQUIREMENT = " must be called before this model is loaded"
REGISTERED: set[str] = set()  # kinds whose weights this process may open


@dataclass(frozen=True)
class Note:
    """The attention that a module's weights belong to: its kind, the call that makes it known to
    Transformers, and its part of the section as text; and whether the weights were pickled since.
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
    """Have an attention module note and mark in state dicts what it does, and look for it in those
    that it loads. A second call replaces the first. `make_note` gives None for stock attention."""
    if not hasattr(module, "_spattention_note"):
        module.register_state_dict_post_hook(_write)
        module.register_load_state_dict_pre_hook(_read_mark)
    module._spattention_note = make_note
    note = make_note(module)
    if note is not None:
        module.register_buffer(MARK, _mark(note, execution_device(module)))
    elif hasattr(module, MARK):
        delattr(module, MARK)


def is_mark(name: str) -> bool:
    """True for the name of a mark in a state dict."""
    return name.rpartition(".")[2] == MARK


def mark_text(mark: torch.Tensor) -> str:
    """The text of a mark, also of one that was averaged or converted with its model's weights."""
    codes = mark.detach().flatten().to("cpu", torch.float32).nan_to_num().round().clamp(0, 255)
    return bytes(codes.to(torch.uint8).tolist()).decode("latin-1")


def _mark(note: Note, device: Any) -> torch.Tensor:
    text = f"{note.kind}: {note.call}{REQUIREMENT}"
    return torch.tensor(list(text.encode("latin-1")), dtype=torch.float32, device=device)


def refill_marks(model: Any, names: Iterable[str]) -> None:
    """Write the marks of these names again, which a checkpoint without marks left unfilled."""
    for name in names:
        module = model.get_submodule(name.rpartition(".")[0])
        note = module._spattention_note(module)
        if note is not None:
            module.register_buffer(MARK, _mark(note, getattr(module, MARK).device))


def _live_mark(note: Note, device: Any) -> torch.Tensor:
    mark = _mark(note, device)
    setattr(mark, LIVE, True)
    return mark


def _write(module: Any, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    note = module._spattention_note(module)
    if note is None:
        return
    if getattr(module.config, note.kind, None) is None:  # taken off, to be saved as dense
        state_dict.pop(prefix + MARK, None)
        return
    local_metadata[NOTE] = note
    found = state_dict.get(prefix + MARK)
    if found is not None:
        # Made again, since the buffer may have been averaged, or never been loaded.
        state_dict[prefix + MARK] = _live_mark(note, found.device)


def _read_mark(
    module: Any,
    state_dict: Any,
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    errors: list[str],
) -> None:
    """A hook of `load_state_dict`: weights without a mark are welcome, those of another kind of
    attention are not.
    """
    note, found = module._spattention_note(module), state_dict.get(prefix + MARK)
    if note is None:
        return
    device = getattr(module, MARK).device
    mark = _mark(note, "cpu" if device.type == "meta" else device)
    if found is not None and found.device.type != "meta" and mark_text(found) != mark_text(mark):
        errors.append(
            f'"{prefix}{MARK}" must be "{mark_text(mark)}" as in the model, got '
            f'"{mark_text(found)[:200]}"'
        )
    state_dict[prefix + MARK] = mark


def checking_notes(load_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `load_state_dict` of Transformers' models."""

    @wraps(load_state_dict)
    def load(self: Any, state_dict: Any, *args: Any, **keywords: Any) -> Any:
        for name, metadata in state_dict_metadata(state_dict).items():
            note = metadata.get(NOTE)
            if note is not None and note.is_from_file:
                _check(self, name, note)
        return load_state_dict(self, _without_live_marks(self, state_dict), *args, **keywords)

    return load


def refusing_lost_sections(save_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `save_pretrained` of Transformers' models, which writes what the config says."""

    @wraps(save_pretrained)
    def save(self: Any, *args: Any, **keywords: Any) -> Any:
        for name, module in self.named_modules():
            make_note = getattr(module, "_spattention_note", None)
            note = None if make_note is None else make_note(module)
            if note is None or attention_name(module.config) != note.kind:
                continue
            if getattr(module.config, note.kind, None) is None:
                raise ValueError(
                    f"`config.{note.kind}` must be there to save a model that runs with it, got "
                    f'none for {name}: apply it again, or call `set_attn_implementation("sdpa")` '
                    "to save a dense model"
                )
        return save_pretrained(self, *args, **keywords)

    return save


def _without_live_marks(model: Any, state_dict: Any) -> Any:
    """A state dict without the marks of modules that have none here; raises `ValueError` for one
    from a file.
    """
    marks = [name for name in state_dict if isinstance(name, str) and is_mark(name)]
    known = {name for name, _ in model.named_buffers()} if marks else set()
    foreign = [name for name in marks if name not in known]
    refuse_saved_marks(state_dict, foreign)
    return copy_state_dict(state_dict, without=foreign) if foreign else state_dict


def refuse_saved_marks(state_dict: Any, names: Iterable[str]) -> None:
    """Check that marks have no model but in memory; raises `ValueError` for one from a file."""
    for name in names:
        if not hasattr(state_dict[name], LIVE):
            raise ValueError(
                "`state_dict` must be loaded into a model with the attention that its weights were "
                f'saved from, "{mark_text(state_dict[name])[:200]}" in {name}, got a model '
                f"without; remove the keys that end in {MARK} if that is meant"
            )


def live_marks(model: Any) -> dict[str, torch.Tensor]:
    """The marks of a model by their names, as `state_dict` writes them."""
    marked = ((name, module) for name, module in model.named_modules() if hasattr(module, MARK))
    notes = ((name, module, module._spattention_note(module)) for name, module in marked)
    return {
        f"{name}.{MARK}": _live_mark(note, getattr(module, MARK).device)
        for name, module, note in notes
        if note is not None
    }


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
