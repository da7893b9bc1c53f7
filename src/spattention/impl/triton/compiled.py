"""Launching a kernel that was compiled before, without Triton's lookup."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from ...compat.triton import direct_launch

MAX_COMPILED = 1024  # compiled forms of a kernel; beyond that, all are looked up again


class CompiledKernelCache:
    """A Triton kernel with the compiled forms of earlier calls.

    Triton finds a compiled form by examining every argument of every call, which takes longer than
    the launch. A call with the same specialization key and the same constants launches what the
    first one launched.

    Args:
        function: the function that `triton.jit` or `gluon.jit` returned.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.compiled: dict[Hashable, tuple[Any, tuple[Any, ...], Callable[..., None]]] = {}

    def __call__(
        self, programs: int, specialization_key: Hashable, *arguments: Any, **constants: Any
    ) -> None:
        """Launch on the current device and stream.

        Args:
            programs: number of programs.
            specialization_key: everything about the arguments that may select a compiled form: the
                device, `specialization` of the tensors, and every int that is not among the
                kernel's `do_not_specialize`.
            arguments: the kernel's arguments, in order.
            constants: its compile-time arguments, and Triton's options.
        """
        key = (specialization_key, *constants.values())
        found = self.compiled.get(key)
        if found is not None:
            _, rest, launch = found
            launch(programs, *arguments, *rest)
            return
        kernel = self.function[(programs,)](*arguments, **constants)
        if kernel is None:  # Triton's interpreter
            return
        if len(self.compiled) >= MAX_COMPILED:
            self.compiled.clear()
        names = self.function.arg_names[len(arguments) :]
        rest = tuple(constants[name] for name in names)
        self.compiled[key] = kernel, rest, direct_launch(kernel, arguments)


def specialization(*tensors: torch.Tensor | None) -> tuple[Hashable, ...]:
    """Dtype and alignment of each tensor, which select a compiled form."""
    return tuple(
        [None if tensor is None else (tensor.dtype, tensor.data_ptr() & 15) for tensor in tensors]
    )
