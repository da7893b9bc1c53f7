"""Options that may be left out, shown and read as values of their type."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    UnsupportedTypeAnnotationError,
)

OPTIONS = ConstructorRegistry()
NONE = "None"


@OPTIONS.primitive_rule
def _optional(
    info: PrimitiveTypeInfo,
) -> PrimitiveConstructorSpec[Any] | UnsupportedTypeAnnotationError | None:
    """The constructor of `T | None`, which help shows as T.

    The word None stands for no value, except where it may be a text or the name of a file.
    """
    kinds = get_args(info.type)
    if get_origin(info.type) not in (Union, UnionType) or len(kinds) != 2 or NoneType not in kinds:
        return None
    kind = next(each for each in kinds if each is not NoneType)
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kind, info.markers))
    if not isinstance(spec, PrimitiveConstructorSpec):
        return spec
    is_word = kind in (str, Path) or spec.choices is not None

    def read(words: list[str]) -> Any:
        return None if words == [NONE] and not is_word else spec.instance_from_str(words)

    def show(value: Any) -> list[str]:
        return [NONE] if value is None else spec.str_from_instance(value)

    def fits(value: Any) -> Any:
        return value is None or spec.is_instance(value)

    return replace(spec, instance_from_str=read, str_from_instance=show, is_instance=fits)
