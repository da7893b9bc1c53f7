"""The files of a PEFT adapter: errors name the one that is damaged or out of place."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..files import read_json, reason

CONFIG_BYTES = 2**26
# What PyTorch's reader of pickles raises for a file that is none, or holds something else.
DAMAGE = (
    SafetensorError,
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
)
CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def refuse_adapter(folder: Path) -> None:
    """Check that a folder, which should hold a whole model, has no adapter; raises `ValueError`."""
    if (folder / CONFIG).exists():
        raise ValueError(
            f"{folder} must hold a whole model, got an adapter ({CONFIG}): merge it into its base "
            "with PEFT's `merge_and_unload`, and save the result and the tokenizer"
        )


def check_config_file(path: Any) -> None:
    """Check that a file holds the config of an adapter; raises `ValueError`."""
    config = read_json(Path(path), CONFIG_BYTES)
    if not isinstance(config.get("peft_type"), str):
        raise ValueError(
            f"{path} must hold the config of an adapter with a `peft_type`, got "
            f"{config.get('peft_type')!r}"
        )


@contextmanager
def naming_weights(
    adapter: Any, damage: tuple[type[Exception], ...] = (SafetensorError, pickle.UnpicklingError)
) -> Iterator[None]:
    """Name the weights of an adapter in errors of their readers. `adapter` is a folder or a name on
    the hub, None for weights in memory.
    """
    try:
        yield
    except damage as error:
        raise ValueError(f"{_weights_of(adapter)} must hold weights: {reason(error)}") from error
    except OSError as error:
        if error.filename is not None or adapter is None or not Path(adapter).is_dir():
            raise
        raise OSError(f"{_weights_of(adapter)} cannot be read: {error}") from error


def checking_configs(find: Callable[..., str | None]) -> Callable[..., str | None]:
    """Wrap Transformers' search for an adapter's config, which it then reads in several places."""

    @wraps(find)
    def found(*args: Any, **keywords: Any) -> str | None:
        path = find(*args, **keywords)
        if path is not None:
            check_config_file(path)
        return path

    return found


def checking_weights(load: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap PEFT's reader of an adapter's weights."""

    @wraps(load)
    def read(model_id: Any, *args: Any, **keywords: Any) -> Any:
        folder = Path(model_id) / (keywords.get("subfolder") or "")
        if folder.is_dir() and not any((folder / name).exists() for name in WEIGHTS):
            raise ValueError(f"{folder} must hold {WEIGHTS[0]} or {WEIGHTS[1]}, it has neither")
        with naming_weights(folder if folder.is_dir() else model_id, DAMAGE):
            weights = load(model_id, *args, **keywords)
        if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
            raise ValueError(
                f"{_weights_of(folder)} must hold tensors by their names, got "
                f"{type(weights).__name__}"
            )
        return weights

    return read


def _weights_of(adapter: Any) -> str:
    """The file of an adapter's weights, where it is here, or a name for it."""
    if adapter is None:
        return "`adapter_state_dict`"
    found = [Path(adapter) / name for name in WEIGHTS if (Path(adapter) / name).exists()]
    return str(found[0]) if found else f"the adapter of {adapter}"
