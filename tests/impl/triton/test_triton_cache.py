"""Cached kernels: the first call of a form goes through Triton, later ones launch its result."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spattention.impl.triton import compiled
from spattention.impl.triton.compiled import CompiledKernelCache, specialization


class Function:
    """As `triton.jit` gives it: `function[grid](...)` launches and gives the compiled form."""

    arg_names = ("p_out", "count", "BLOCK", "WIDE")

    def __init__(self, interpreted: bool = False) -> None:
        self.interpreted = interpreted
        self.calls: list[Any] = []
        self.launches: list[Any] = []

    def __getitem__(self, grid: tuple[int]) -> Any:
        def run(*arguments: Any, **constants: Any) -> Any:
            self.calls.append((grid, arguments, constants))
            return None if self.interpreted else Compiled(self, constants["BLOCK"])

        return run


class Compiled:
    def __init__(self, function: Function, block: int) -> None:
        self.function, self.block = function, block

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self.function.launches.append((self.block, grid, arguments))


CONSTANTS: dict[str, Any] = {"num_warps": 4, "WIDE": True, "BLOCK": 64}


def test_later_calls_launch_the_first_form() -> None:
    function = Function()
    run = CompiledKernelCache(function)
    run(7, "form", "out", 3, **CONSTANTS)
    assert function.calls == [((7,), ("out", 3), CONSTANTS)]
    assert function.launches == []
    run(9, "form", "other", 5, **CONSTANTS)
    assert len(function.calls) == 1
    # Compile-time arguments follow in the kernel's order, and Triton's options stay out.
    assert function.launches == [(64, (9, 1, 1), ("other", 5, 64, True))]


@pytest.mark.parametrize("change", [{"num_warps": 8}, {"WIDE": False}, {"BLOCK": 32}])
def test_other_constants_are_another_form(change: dict[str, Any]) -> None:
    function = Function()
    run = CompiledKernelCache(function)
    run(1, "form", "out", 3, **CONSTANTS)
    run(1, "form", "out", 3, **CONSTANTS | change)
    run(1, "another", "out", 3, **CONSTANTS)
    assert len(function.calls) == 3
    run(1, "form", "out", 3, **CONSTANTS | change)
    assert [block for block, *_ in function.launches] == [change.get("BLOCK", 64)]


def test_interpreted_kernels_are_not_cached() -> None:
    function = Function(interpreted=True)
    run = CompiledKernelCache(function)
    for _ in range(2):
        run(1, "form", "out", 3, **CONSTANTS)
    assert len(function.calls) == 2


def test_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MAX_COMPILED", 4)
    function = Function()
    run = CompiledKernelCache(function)
    for form in range(20):
        run(1, form, "out", 3, **CONSTANTS)
        run(1, form, "out", 3, **CONSTANTS)
        assert len(run.compiled) <= 4
    assert len(function.calls) == len(function.launches) == 20


def test_specialization_has_dtype_and_alignment() -> None:
    row = torch.zeros(9, dtype=torch.bfloat16)
    assert specialization(row) == specialization(torch.ones(3, 5, dtype=torch.bfloat16))
    assert (
        len(
            {
                specialization(row),
                specialization(row[1:]),
                specialization(row.half()),
                specialization(None),
                specialization(row, row),
            }
        )
        == 5
    )
