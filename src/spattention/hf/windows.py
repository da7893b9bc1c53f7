"""Sliding windows that layers have of their own, and trade for bands."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from ..bands import BandPattern

KIND = ("sliding", "layer_types")  # in the names by which a module tells that it has a window


def _window(config: Any, layer: int) -> int | None:
    """A layer's own sliding window in tokens, None if it attends everything."""
    types = getattr(config, "layer_types", None)
    if types is not None and types[layer] == "full_attention":
        return None
    return getattr(config, "sliding_window", None)


def keeps_window(config: Any, layer: int, pattern: BandPattern) -> bool:
    """Whether a layer stays as it is when nobody named it."""
    window = _window(config, layer)
    if window is None:
        return False
    # Where all layers share one window (Mistral's default is 4096), a span within it takes nothing
    # away from them.
    return getattr(config, "layer_types", None) is not None or window < pattern.span


def _replaced(config: Any, chosen: Sequence[BandPattern | None]) -> list[int]:
    """Layers that trade a sliding window for a pattern."""
    return [i for i, entry in enumerate(chosen) if entry and _window(config, i) is not None]


def check_windows(
    config: Any, modules: dict[int, Any], chosen: Sequence[BandPattern | None]
) -> None:
    """Whether `replace_windows` can do it; raises `ValueError`."""
    replaced = _replaced(config, chosen)
    if not replaced:
        return
    types = getattr(config, "layer_types", None)
    if types is None and len(replaced) != len(chosen):
        raise ValueError(
            "`pattern` must be given to all layers or none of a model whose one sliding window is "
            f"that of every layer, got {len(replaced)} of {len(chosen)}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(rope.get(kind), dict) for kind in set(types or ())):
        raise ValueError(
            "`pattern` must not replace a sliding window in a model whose positions are encoded "
            f"differently there, got layers {replaced}"
        )
    for kind in {type(modules[index]) for index in replaced}:
        other = what_else(kind)
        if other:
            raise ValueError(
                f"`pattern` must not replace a sliding window in {kind.__name__}, where more "
                f"depends on it than the mask ({', '.join(other)}), got layers {replaced}"
            )


def replace_windows(
    model: Any,
    configs: Sequence[Any],
    modules: dict[int, Any],
    chosen: Sequence[BandPattern | None],
) -> None:
    """Layers that trade a sliding window for a pattern count as full attention elsewhere."""
    replaced = _replaced(configs[0], chosen)
    if not replaced:
        return
    if getattr(configs[0], "layer_types", None) is None:
        for entry in configs:
            entry.sliding_window = None
        return
    for entry in configs:
        entry.layer_types = [
            "full_attention" if i in replaced else kind for i, kind in enumerate(entry.layer_types)
        ]
    for parent in model.modules():
        for child in parent.children():
            if any(child is modules[i] for i in replaced):
                for holder, name in ((parent, "attention_type"), (child, "layer_type")):
                    if hasattr(holder, name):
                        setattr(holder, name, "full_attention")
    for index in replaced:
        if hasattr(modules[index], "sliding_window"):
            modules[index].sliding_window = None


def what_else(kind: type) -> tuple[str, ...]:
    """What an attention class does otherwise in layers with a window, beside the mask: attributes
    that its constructor sets by the kind of the layer and its forward pass reads for more than the
    keyword `sliding_window`. Some rotate positions in such layers alone (Cohere2, Exaone4, Afmoe).

    By reading its source, since nothing else tells; empty where there is none.
    """
    try:
        built, forward = (_parsed(kind.__init__), _parsed(kind.forward))  # type: ignore[misc,attr-defined]
    except (OSError, TypeError):
        return ()
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
