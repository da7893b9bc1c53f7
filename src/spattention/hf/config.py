"""The section `config.spattention` of a Transformers config: what it holds, and its validation.

    {"version": 1, "patterns": [...], "layers": [index or None per text layer], "sinks": bool}

`patterns` are `BandPattern.to_dict()`; `layers` says which of them each text layer runs, None for
its own attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..bands import BandPattern
from ..compat.huggingface import attention_name

NAME = "spattention"
VERSION = 1
ENTRIES = ("version", "patterns", "layers", "sinks")
MAX_SPAN = 2**29  # tokens; the kernels' limit


class Section(dict[str, Any]):
    """`config.spattention` as Transformers saves it, with its patterns read once.

    Attributes:
        layer_patterns: the pattern of each text layer, None for a layer that keeps its own
            attention.
        sinks: whether the layers with a pattern have sinks.
    """

    layer_patterns: tuple[BandPattern | None, ...]

    def __init__(self, data: Mapping[str, Any], num_layers: int) -> None:
        """Validate `data` for a model of `num_layers` text layers; raises `ValueError`."""
        super().__init__(data)
        patterns = _patterns(data)
        self.layer_patterns = tuple(
            None if index is None else patterns[index]
            for index in _layers(data["layers"], len(patterns), num_layers)
        )
        if num_layers and not any(self.layer_patterns):
            raise ValueError(
                "`config.spattention` must give at least one layer a pattern, got None for all "
                f"{num_layers} in `layers`"
            )

    @property
    def sinks(self) -> bool:
        return bool(self["sinks"])

    def __reduce__(self) -> tuple[Any, ...]:
        # A dict subclass is otherwise rebuilt without the argument `num_layers`.
        return Section, (dict(self), len(self.layer_patterns))

    def __deepcopy__(self, memo: dict[int, Any]) -> Section:
        # Never changed after it is made, so a copied config may share it.
        return self


def section_of(layer_patterns: Sequence[BandPattern | None], sinks: bool) -> Section:
    """The section for one pattern (or None) per text layer; equal patterns are stored once."""
    distinct: list[BandPattern] = []
    layers: list[int | None] = []
    for pattern in layer_patterns:
        if pattern is not None and pattern not in distinct:
            distinct.append(pattern)
        layers.append(None if pattern is None else distinct.index(pattern))
    data = {
        "version": VERSION,
        "patterns": [pattern.to_dict() for pattern in distinct],
        "layers": layers,
        "sinks": sinks,
    }
    return Section(data, len(layers))


def read_section(config: Any) -> Section | None:
    """The section of a text config, parsed on the first call and kept there; None if it has
    none.
    """
    data = getattr(config, NAME, None)
    if data is None or isinstance(data, Section):
        return data
    section = Section(data, config.num_hidden_layers) if isinstance(data, Mapping) else None
    if section is None:
        raise ValueError(f"`config.spattention` must be a mapping, got {type(data).__name__}")
    config.spattention = section
    return section


def remove_section(config: Any) -> None:
    """Take the attention that a config names off it, with its section: a model that is loaded with
    the config and `attn_implementation="sdpa"` is dense.
    """
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name in (NAME, attention_name(part), "attn_implementation"):
            if name is not None and hasattr(part, name):
                delattr(part, name)


def _patterns(data: Mapping[str, Any]) -> list[BandPattern]:
    # The version first: another version may have other entries.
    version = data.get("version")
    if version != VERSION or isinstance(version, bool):
        raise ValueError(
            f"`config.spattention` must have version {VERSION} (the one this library writes), "
            f"got {data.get('version')!r}"
        )
    if sorted(map(str, data)) != sorted(ENTRIES):
        raise ValueError(
            f"`config.spattention` must have the entries {list(ENTRIES)}, got "
            f"{sorted(map(str, data))}"
        )
    if not isinstance(data["sinks"], bool):
        raise ValueError(
            f"`config.spattention` must have a bool for `sinks`, got {data['sinks']!r}"
        )
    if not isinstance(data["patterns"], Sequence):
        raise ValueError(
            f"`config.spattention` must have a list of `patterns`, got {data['patterns']!r}"
        )
    return [_pattern(entry, index) for index, entry in enumerate(data["patterns"])]


def _pattern(entry: Any, index: int) -> BandPattern:
    try:
        pattern = BandPattern.from_dict(entry)
    except ValueError as error:
        raise ValueError(f"`config.spattention`, pattern {index}: {error}") from error
    if pattern.span > MAX_SPAN:
        raise ValueError(
            f"`span` of a pattern in `config.spattention` must be at most {MAX_SPAN} tokens, got "
            f"{pattern.span} in pattern {index}"
        )
    return pattern


def _layers(layers: Any, num_patterns: int, num_layers: int) -> Sequence[int | None]:
    if not isinstance(layers, Sequence) or len(layers) != num_layers:
        raise ValueError(
            f"`config.spattention` must have one entry of `layers` per text layer, {num_layers}, "
            f"got {layers!r}"
        )
    for index in layers:
        valid = index is None or (type(index) is int and 0 <= index < num_patterns)
        if not valid:
            raise ValueError(
                f"`config.spattention` must have None or an index below {num_patterns} (the number "
                f"of patterns) in `layers`, got {index!r}"
            )
    return layers
