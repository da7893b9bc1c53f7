"""The constructor of a pattern and its arguments, kept beside the bands for people to read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .scalars import as_int
from .widths import integer, integers

CONSTRUCTORS = ("dense", "shared_local", "exclusive", "sliding_window", "gapped", "local_only")
MAX_COMPARED = 4096  # heads: checking a file must not cost much more than it holds


def plain(constructor: Any) -> dict[str, Any] | None:
    """A copy of plain strings, integers and lists, as JSON keeps them; None for anything else,
    since a constructor that came with a file is only for reading."""
    if not isinstance(constructor, Mapping) or not isinstance(constructor.get("name"), str):
        return None
    found: dict[str, Any] = {}
    try:
        for name, value in constructor.items():
            if isinstance(value, str):
                found[str(name)] = value
            elif as_int(value) is None and isinstance(value, Iterable):
                found[str(name)] = list(integers("constructor", value))
            else:
                found[str(name)] = integer("constructor", value)
    except ValueError:
        return None
    heads = found.get("heads", [0, 0])
    return found if isinstance(heads, list) and len(heads) == 2 else None


def differs(pattern: Any) -> bool:
    """True if a constructor of this library gives a `BandPattern` other bands than it has; not
    for arguments that it does not take, which another version may."""
    arguments = dict(pattern.constructor or {})
    name, heads = arguments.pop("name", None), arguments.pop("heads", None)
    if name not in CONSTRUCTORS:
        return False
    prefix, count = arguments.pop("prefix", pattern.prefix), arguments.get("num_heads")
    if (arguments.get("span"), prefix) != (pattern.span, pattern.prefix):
        return True
    if not isinstance(count, int) or count > max(pattern.num_heads, MAX_COMPARED):
        return True
    try:
        made = getattr(type(pattern), name)(**arguments, prefix=prefix)
        return bool(pattern != (made if heads is None else made.heads(*heads)))
    except ValueError:
        return True
    except TypeError:
        return False
