"""Read in an attention class what depends on a sliding window beside the mask."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

KIND = ("sliding", "layer_types")  # in the names by which a module tells that it has a window


def what_else(kind: type) -> tuple[str, ...]:
    """Attributes that a constructor sets by the kind of the layer and a forward pass reads for more
    than the keyword `sliding_window`. Some rotate positions in layers with a window alone.
    """
    built, forward = _parsed(kind.__init__), _parsed(kind.forward)
    names: set[str] = set()
    _set_by_kind(built.body, names, False)
    found: set[str] = set()
    for statement in forward.body:
        _read_for_more(statement, names, found)
    return tuple(sorted(found))


def _parsed(function: Callable[..., Any]) -> ast.FunctionDef:
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    (found,) = ast.parse(source).body
    assert isinstance(found, ast.FunctionDef)
    return found


def _tells(name: str, names: set[str]) -> bool:
    return name in names or any(word in name for word in KIND)


def _depends(node: ast.AST, names: set[str]) -> bool:
    """Whether an expression depends on the kind of the layer."""
    return any(
        (isinstance(part, ast.Attribute) and _tells(part.attr, names))
        or (isinstance(part, ast.Name) and _tells(part.id, names))
        or (isinstance(part, ast.Constant) and _tells(str(part.value), names))
        for part in ast.walk(node)
    )


def _set_by_kind(body: Sequence[ast.stmt], names: set[str], inside: bool) -> None:
    """Adds what statements set by the kind of the layer; `inside`: they run in one kind alone."""
    for node in body:
        if isinstance(node, ast.If):
            either = inside or _depends(node.test, names)
            _set_by_kind(node.body, names, either)
            _set_by_kind(node.orelse, names, either)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and (inside or _depends(node, names)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {t.attr for t in targets if isinstance(t, ast.Attribute)}
            names |= {t.id for t in targets if isinstance(t, ast.Name)}


def _read_for_more(node: ast.AST, names: set[str], found: set[str]) -> None:
    """Adds the attributes that are read elsewhere than for the keyword `sliding_window`."""
    if isinstance(node, ast.keyword) and node.arg == "sliding_window":
        return
    if isinstance(node, ast.Attribute) and _tells(node.attr, names):
        found.add(node.attr)
    for child in ast.iter_child_nodes(node):
        _read_for_more(child, names, found)
