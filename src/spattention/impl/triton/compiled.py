"""Launching a kernel that has been compiled before, without Triton's search for it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

MAX_KEPT = 1024  # compiled forms of a kernel; after so many, all are looked up anew


class Kernel:
    """A kernel of Triton's, whose compiled forms are kept by what the caller says they depend on.

    Triton finds the compiled form by examining every argument of every call, which for thirty
    arguments takes longer than the launch. A call with the same `depends` and the same constants
    runs what the first one ran.

    Args:
        function: the function that `triton.jit` or `gluon.jit` gave.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.kept: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}

    def __call__(self, programs: int, depends: Hashable, *arguments: Any, **constants: Any) -> None:
        """Launch on the current device and stream.

        Args:
            programs: how many.
            depends: of the arguments, all that may choose a compiled form: the device, `kinds` of
                the tensors, and every int that is not among the kernel's `do_not_specialize`.
            arguments: in the kernel's order.
            constants: its compile-time arguments, and Triton's options.
        """
        key = (depends, *constants.values())
        found = self.kept.get(key)
        if found is not None:
            compiled, rest = found
            compiled[(programs, 1, 1)](*arguments, *rest)
            return
        compiled = self.function[(programs,)](*arguments, **constants)
        if compiled is None:  # Triton's interpreter
            return
        if len(self.kept) >= MAX_KEPT:
            self.kept.clear()
        names = self.function.arg_names[len(arguments) :]
        self.kept[key] = compiled, tuple(constants[name] for name in names)


def kinds(*tensors: torch.Tensor | None) -> tuple[Hashable, ...]:
    """What a compiled form depends on: per tensor its dtype and alignment."""
    return tuple(
        None if tensor is None else (tensor.dtype, tensor.data_ptr() & 15) for tensor in tensors
    )
