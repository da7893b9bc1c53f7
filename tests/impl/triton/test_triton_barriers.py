"""Kernels that no test without a Hopper GPU can run: the lifetime of their barriers, by reading."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import spattention

SOURCES = sorted((Path(spattention.__file__).parent / "impl" / "triton" / "hopper").glob("*.py"))
MAKERS = ("allocate_barriers", "allocate_ring")


def _calls(function: ast.FunctionDef, *names: str) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in names
    ]


def _kernels() -> list[tuple[str, ast.FunctionDef]]:
    """Functions that allocate barriers, except those that return them."""
    return [
        (path.stem, node)
        for path in SOURCES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name not in MAKERS and _calls(node, *MAKERS)
    ]


def test_kernels_with_barriers_are_found() -> None:
    assert {name for name, _ in _kernels()} == {
        "backward",
        "forward",
        "forward_persistent",
        "backward_preprocess",
        "fused_backward",
    }


@pytest.mark.parametrize(("module", "kernel"), _kernels(), ids=lambda x: getattr(x, "name", x))
def test_barriers_are_ended_last(module: str, kernel: ast.FunctionDef) -> None:
    """PTX: the memory of a barrier may hold nothing else before `mbarrier.inval`; Triton reuses it
    after the last access.
    """
    made = _calls(kernel, *MAKERS)
    ended = _calls(kernel, "invalidate", "invalidate_ring")
    names = {
        ast.unparse(node.targets[0])
        for node in ast.walk(kernel)
        if isinstance(node, ast.Assign) and node.value in made
    }
    assert len(names) == len(made)
    assert {ast.unparse(call.args[0]) for call in ended} == names
    used = _calls(kernel, "consumer_wait", "copy_tokens", "store_tokens", "warp_specialize")
    last = max(call.lineno for call in used)
    assert all(call.lineno > last for call in ended)
