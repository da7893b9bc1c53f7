"""A module beside a saved model that registers this library, for tools that never call `register`.

Such tools (lm_eval, `transformers serve`) open a folder with `trust_remote_code=True` if their user
says so. Transformers then imports the module that `auto_map` of the config names: already with the
config, because some tools look the architecture up before they open the model.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from ..files import read_json, write_atomically
from .adapter_files import CONFIG_BYTES, refuse_adapter
from .section import ARCHITECTURE_PREFIX, CONFIG_LOADER, LOADER, required_call

AUTO_CLASSES = {
    "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForImageTextToText": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
MODULE = '''"""Registers spattention, which this model needs: pip install 'spattention[hf]'."""

import transformers

import {module}

{call}


class {name}(transformers.{name}):
    """The same model, of which Transformers saves this module along."""


class Config(transformers.AutoConfig):
    """Opens the config with Transformers' own class."""

    @classmethod
    def from_pretrained(cls, *arguments, **options):
        return transformers.AutoConfig.from_pretrained(
            *arguments, **options | {{"trust_remote_code": False}}
        )

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Nothing: `from_pretrained` gives no object of this class."""
'''


def add_loader(folder: str | Path) -> None:
    """Let a saved model be opened by tools that pass `trust_remote_code=True` and register nothing.

    Writes `modeling_spattention.py` into the folder, some lines that import and register this
    library, and names it as `auto_map` in config.json. Everybody else opens the folder as before:
    after `register()`, or not at all. A model that came through the module is saved with it.

    Args:
        folder: of a model with bands or a baseline, as `save_pretrained` wrote it.

    Raises:
        ValueError: if the folder holds no such model, or one that brings code of its own.
    """
    if not isinstance(folder, str | Path):
        raise ValueError(f"`folder` must be a path, got {type(folder).__name__}")
    path = Path(folder) / "config.json"
    refuse_adapter(Path(folder))
    config = read_json(path, CONFIG_BYTES)
    call = required_call(config)
    if call is None:
        raise ValueError(f"`folder` must hold a model with bands or a baseline, {path} has none")
    named = config.get("architectures")
    architecture = str(named[0] if isinstance(named, list) and named else named)
    name = architecture.removeprefix(ARCHITECTURE_PREFIX)
    classes = [auto for auto, models in AUTO_CLASSES.items() if name in models.values()]
    if not classes:
        raise ValueError(
            f"{path} must name a model of Transformers that generates text as `architectures`, got "
            f"{named!r}"
        )
    wanted = CONFIG_LOADER | dict.fromkeys(classes, f"{LOADER}.{name}")
    found = config.get("auto_map")
    if found and not wanted.items() >= found.items():
        raise ValueError(f"{path} must not have an `auto_map` of other code, got {found!r}")
    module, _, _ = call.rpartition(".")
    text = MODULE.format(module=module, name=name, call=call)
    write_atomically(Path(folder) / f"{LOADER}.py", text)
    write_atomically(path, json.dumps(config | {"auto_map": wanted}, indent=2) + "\n")
