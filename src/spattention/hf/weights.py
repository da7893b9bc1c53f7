"""Weights that were saved by themselves, such as `torch.save(model.state_dict())`.

PyTorch keeps notes beside the tensors of a state dict, one per module, and pickles them along. For
an attention module with bands (or a baseline) the note says which. So a file of weights alone
cannot be opened in a process that has not registered the kind, and its weights not be loaded into a
model without it.

Formats that hold tensors alone, such as safetensors, have no place for notes. For them each such
module also has a buffer, the mark: a text that names the call and ends in a digest of the note, as
float32, because programs average state dicts as if all tensors were. Strict loading refuses it as
unexpected, in any process. State dicts that stay in memory go anywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import Any

import torch

from ..compat.huggingface import attention_name
from ..compat.pytorch import copy_state_dict, state_dict_metadata
from .sinks import execution_device

NOTE = "spattention"  # in the metadata of a module
MARK = "spattention_mark"  # the buffer of a module
LIVE = "spattention_live"  # attribute of a mark in a state dict: its note, pickled along
REQUIREMENT = " must be called before this model is loaded"
DIGEST = "; attention "  # comes before the digest in a mark
DIGEST_CHARACTERS = 16  # all marks of a kind have the same length, whatever the attention
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
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


class MarkName(str):
    """The name of a mark, as a key of a state dict. Pickled it asks for the kind, as a note does:
    copies of a state dict keep it, and so do distributed checkpoints, in their metadata.

    Attributes:
        kind: name of the attention kind.
        call: what makes it known to Transformers.
    """

    kind: str
    call: str

    def __new__(cls, name: str, kind: str, call: str) -> MarkName:
        made = super().__new__(cls, name)
        made.kind, made.call = kind, call
        return made

    def __str__(self) -> str:
        return self  # distributed checkpoints make texts of all names

    def __reduce__(self) -> tuple[Any, ...]:
        plain = str.__str__(self)
        return call_register_before_loading, (self.kind, self.call, plain, True)

    def __deepcopy__(self, memo: dict[int, Any]) -> MarkName:
        return self


def call_register_before_loading(
    kind: str, call: str, text: str, is_name: bool = False
) -> Note | MarkName:
    """Make a note again, or the name of a mark. PyTorch names this function where it does not know
    it.
    """
    if kind not in REGISTERED:
        raise ValueError(f"{kind}: {call} must be called before these weights are loaded")
    return MarkName(text, kind, call) if is_name else Note(kind, call, text, is_from_file=True)


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


def note_added(module: Any, names: Collection[str]) -> None:
    """Remember the parameters that an attention module got with its attention; without that, they
    would be saved and mean nothing."""
    module._spattention_added = frozenset(names)


def no_note(module: Any) -> Note | None:
    """The note of a module that has stock attention again."""
    return None


def is_mark(name: str) -> bool:
    """True for the name of a mark in a state dict."""
    return name.rpartition(".")[2] == MARK


def mark_text(mark: torch.Tensor) -> str:
    """The text of a mark, also of one that was averaged or converted with its model's weights."""
    codes = mark.detach().flatten().to("cpu", torch.float32).nan_to_num().round().clamp(0, 255)
    return bytes(codes.to(torch.uint8).tolist()).decode("latin-1")


def _mark(note: Note, device: Any) -> torch.Tensor:
    return torch.tensor(list(_text(note).encode("latin-1")), dtype=torch.float32, device=device)


def _text(note: Note) -> str:
    digest = hashlib.sha256(note.text.encode()).hexdigest()[:DIGEST_CHARACTERS]
    return f"{note.kind}: {note.call}{REQUIREMENT}{DIGEST}{digest}"


def refill_marks(model: Any, names: Iterable[str]) -> None:
    """Write the marks of these names again, which a checkpoint without marks left unfilled."""
    for name in names:
        module = model.get_submodule(name.rpartition(".")[0])
        note = module._spattention_note(module)
        if note is not None:
            device = getattr(module, MARK).device
            if device.type == "meta":
                device = execution_device(module) or "cpu"
            module.register_buffer(MARK, _mark(note, device))


def _live_mark(note: Note, device: Any) -> torch.Tensor:
    mark = _mark(note, device)
    setattr(mark, LIVE, note)
    return mark


def _write(module: Any, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    note = module._spattention_note(module)
    if note is None:
        return
    if _is_taken_off(module, note):
        for name in _bands_alone(state_dict, prefix):
            del state_dict[name]
        return
    local_metadata[NOTE] = note
    found = state_dict.pop(prefix + MARK, None)
    if found is not None:
        # Made again, since the buffer may have been averaged, or never been loaded.
        name = MarkName(prefix + MARK, note.kind, note.call)
        state_dict[name] = _live_mark(note, found.device)


def _is_taken_off(module: Any, note: Note) -> bool:
    """True if the section of a module's attention was deleted, for it to be saved as dense."""
    return getattr(module.config, note.kind, None) is None


def _lost_sections(model: Any) -> Iterator[tuple[str, Any, Note]]:
    """Names, modules and notes of attention whose section was deleted."""
    for name, module in model.named_modules():
        note = _own_note(module)
        if note is not None and _is_taken_off(module, note):
            yield name, module, note


def refuse_lost_section(model: Any) -> None:
    """Check that no section was deleted in a model whose adapter is saved. Raises `ValueError`."""
    for name, _, note in _lost_sections(model):
        raise ValueError(
            f"`config.{note.kind}` must be there to save an adapter that was trained with it, got "
            f"none for {name}"
        )


def _same_attention(text: str, other: str) -> bool:
    """True if two marks name the same attention. Those of earlier versions name its kind alone."""
    (kind, _, digest), (other_kind, _, second) = text.partition(DIGEST), other.partition(DIGEST)
    return kind == other_kind and (digest == second or not (digest and second))


def refuse_changed_mark(name: str, before: str, now: str) -> None:
    """Check that a tensor with this mark's text was overwritten by one of the same attention."""
    if DIGEST in before and not _same_attention(now, before):  # others hold no text yet
        raise ValueError(
            "`state_dict` must be that of a model with the attention that the checkpoint was saved "
            f'from, "{now[:200]}" in {name}, got "{before}"'
        )


def _bands_alone(state_dict: Any, prefix: str) -> list[str]:
    """Names in a state dict that a module has for its bands: the mark, and sinks of any form."""
    ours = (prefix + MARK, f"{prefix}sinks")
    return [name for name in state_dict if name in ours or name.startswith(f"{prefix}sinks.")]


def _read_mark(module: Any, state_dict: Any, prefix: str, *rest: Any) -> None:
    """A hook of `load_state_dict`: weights without a mark are welcome, and the buffer stays.
    Weights of a part of a model, such as a layer, meet no other check.
    """
    note = module._spattention_note(module)
    found = state_dict.get(prefix + MARK)
    if found is not None:
        refuse_mark_of_other(note, prefix + MARK, found)
    if note is not None:
        if _is_taken_off(module, note):  # its state dict has no sinks, as `_write` says
            own = module.named_parameters(recurse=True)
            ours = {prefix + name: tensor.detach() for name, tensor in own}
            for name in _bands_alone(ours, prefix):
                state_dict.setdefault(name, ours[name])
        device = getattr(module, MARK).device
        state_dict[prefix + MARK] = _mark(note, "cpu" if device.type == "meta" else device)


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


def refusing_other_marks(load: Callable[..., None]) -> Callable[..., None]:
    """Wrap `_load_from_state_dict` of Transformers' models, which PyTorch calls before it loads
    their modules, strict or not, also for a state dict of what wraps them.
    """

    @wraps(load)
    def checked(self: Any, state_dict: Any, prefix: str, *args: Any, **keywords: Any) -> None:
        for name in state_dict:
            if name.startswith(prefix) and is_mark(name):
                refuse_other_mark(self, name.removeprefix(prefix), state_dict[name])
        load(self, state_dict, prefix, *args, **keywords)

    return checked


def refuse_other_mark(model: Any, name: str, found: torch.Tensor) -> None:
    """Check that a mark in a state dict is that of the model's own module.

    Args:
        model: of Transformers.
        name: of the mark in the model.
        found: the mark. One that was never in a file may have no place in the model, or be that of
            other bands. One that an earlier version wrote has no digest.

    Raises:
        ValueError: for a mark of other attention.
    """
    refuse_mark_of_other(_note_of(model, name.rpartition(".")[0]), name, found)


def refuse_mark_of_other(note: Note | None, name: str, found: torch.Tensor) -> None:
    """Check that a mark belongs to weights with this note; raises `ValueError`."""
    if found.device.type == "meta":
        return
    wanted, text = "none" if note is None else _text(note), mark_text(found)
    live = getattr(found, LIVE, None)
    if live is None or live.is_from_file or _text(live) != text:  # a file may be read into a mark
        fits = _same_attention(text, wanted)
    else:
        fits = note is None or note.kind == live.kind
    if fits or (note is not None and _is_rounded(found, _mark(note, "cpu"))):
        return
    named = f'"{text[:200]}"' if REQUIREMENT in text else "a mark that cannot be read"
    raise ValueError(
        "weights must be loaded into a model with the attention that they were saved from, "
        f'{named} in {name}, of {found.dtype}, got "{wanted}"; restore the config.json that they '
        "were saved with; to change the attention, apply another to the loaded model; to take "
        f"weights as they are, remove the keys that end in {MARK}"
    )


def _is_rounded(found: torch.Tensor, own: torch.Tensor) -> bool:
    """True for a mark that was cast to eight bits with its model's weights, and is this one so far
    as they tell."""
    given = found.detach().to("cpu", torch.float32)
    return any(torch.equal(given, own.to(dtype).float()) for dtype in FLOAT8)


def _note_of(model: Any, name: str) -> Note | None:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    return _own_note(module)


def _own_note(module: Any) -> Note | None:
    return getattr(module, "_spattention_note", no_note)(module)


def refusing_lost_sections(save_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `save_pretrained` of Transformers' models, which writes what the config says."""

    parameters = signature(save_pretrained)

    @wraps(save_pretrained)
    def save(self: Any, *args: Any, **keywords: Any) -> Any:
        given = parameters.bind(self, *args, **keywords)
        weights = given.arguments.get("state_dict")
        for name, module, note in _lost_sections(self):
            if attention_name(module.config) == note.kind:
                raise ValueError(
                    f"`config.{note.kind}` must be there to save a model that runs with it, got "
                    f'none for {name}: apply it again, or call `set_attn_implementation("sdpa")` '
                    "to save a dense model"
                )
            added: frozenset[str] = getattr(module, "_spattention_added", frozenset())
            left = sorted(added & {name for name, _ in module.named_parameters()})
            if left:
                raise ValueError(
                    f"`config.{note.kind}` must be there to save a model with the weights that it "
                    f"added, got none for {name}.{left[0]}: put the section back"
                )
            if weights is not None:
                # It may have been taken before the section was taken off.
                weights = copy_state_dict(weights, without=_bands_alone(weights, f"{name}."))
                given.arguments["state_dict"] = weights
        return save_pretrained(*given.args, **given.kwargs)

    return save


def _without_live_marks(model: Any, state_dict: Any) -> Any:
    """A state dict without the marks of modules that have none here; raises `ValueError` for one
    from a file.
    """
    marks = [name for name in state_dict if isinstance(name, str) and is_mark(name)]
    for name in marks:
        refuse_other_mark(model, name, state_dict[name])
    known = {name for name, _ in model.named_buffers()} if marks else set()
    foreign = [name for name in marks if name not in known]
    return copy_state_dict(state_dict, without=foreign) if foreign else state_dict


def live_marks(model: Any) -> dict[str, torch.Tensor]:
    """The marks of a model by their names, as `state_dict` writes them."""
    marked = ((name, module) for name, module in model.named_modules() if hasattr(module, MARK))
    notes = ((name, module, module._spattention_note(module)) for name, module in marked)
    return {
        MarkName(f"{name}.{MARK}", note.kind, note.call): _live_mark(
            note, getattr(module, MARK).device
        )
        for name, module, note in notes
        if note is not None
    }


def _check(model: Any, name: str, note: Note) -> None:
    try:
        model.get_submodule(name)
    except AttributeError:
        return  # weights of another model, which PyTorch refuses
    found = _note_of(model, name)
    if found is None or (found.kind, found.text) != (note.kind, note.text):
        raise ValueError(
            f"`state_dict` must be loaded into a model with the `config.{note.kind}` that its "
            f"weights were saved from, {note.text} in {name}, got "
            f"{'none' if found is None else f'{found.kind}: {found.text}'}"
        )
