"""Have Transformers' Trainer resume a run with the attention that it was trained with.

The Trainer loads a checkpoint's weights into the model that it was given, passes over tensors that
have no place there, and never looks at a config. So its `trainer_state.json` carries the section,
under a name that a process without the kind refuses: it becomes an argument of `TrainerState`.

Imported as soon as both Transformers' callbacks and a registered kind are there.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any

from transformers import TrainerState

from ..files import write_atomically
from .section import KINDS, AttentionKind, check_same_section, section_in

MODEL = "_spattention_model"  # of a state: a weak reference to the model that is trained
READ = "_spattention_read"  # of a state from a file: kind, section and file


def _requirement(kind: AttentionKind) -> str:
    return f"{kind.name}: {kind.call} must be called before this training is resumed"


def _saving_section(save_to_json: Callable[..., None]) -> Callable[..., None]:
    @wraps(save_to_json)
    def save(self: Any, json_path: Any) -> None:
        reference = vars(self).get(MODEL)
        found = None if reference is None else section_in(reference())
        if found is None:
            return save_to_json(self, json_path)
        # In the form of Transformers, at once: no file ever lacks the section.
        data = {**asdict(self), _requirement(KINDS[found[0]]): found[1]}
        write_atomically(Path(json_path), json.dumps(data, indent=2, sort_keys=True) + "\n")

    return save


def _reading_section(load_from_json: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(load_from_json)
    def read(cls: type, json_path: Any) -> Any:
        try:
            data = json.loads(Path(json_path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{json_path} must hold JSON: {error}") from error
        if not isinstance(data, dict):
            raise ValueError(
                f"{json_path} must hold the state of a training, got {type(data).__name__}"
            )
        for kind in KINDS.values():
            if _requirement(kind) in data:
                section = data.pop(_requirement(kind))
                state = cls(**data)
                setattr(state, READ, (kind.name, section, str(json_path)))
                return state
        return load_from_json(cls, json_path)

    return read


def _checking_model(init_training_references: Callable[..., None]) -> Callable[..., None]:
    """Wrap the method by which a state meets its Trainer, when training begins."""

    @wraps(init_training_references)
    def init(self: Any, trainer: Any, *args: Any, **keywords: Any) -> None:
        found = section_in(trainer.model)
        if READ in vars(self):
            name, section, file = vars(self)[READ]
            rule = (
                f"the training of {file} must be resumed with a model with the `config.{name}` "
                "that it was trained with"
            )
            check_same_section(rule, (name, section), found)
        setattr(self, MODEL, weakref.ref(trainer.model))
        init_training_references(self, trainer, *args, **keywords)

    return init


def _install() -> None:
    TrainerState.save_to_json = _saving_section(TrainerState.save_to_json)
    load = TrainerState.__dict__["load_from_json"].__func__
    TrainerState.load_from_json = classmethod(_reading_section(load))
    init = TrainerState.init_training_references
    TrainerState.init_training_references = _checking_model(init)


_install()
