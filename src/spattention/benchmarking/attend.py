"""A call that is timed, and what a competitor must offer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..bands import BandPattern

Tensors = tuple[Tensor, ...]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # query, key, value, the output's gradient


@dataclass(frozen=True)
class Attend:
    """A call on fixed inputs, and the gradients of them.

    Args:
        forward: gives the output, whose layout is that of the inputs.
        inputs: query, key, value, and the output's gradient.
        sinks: learned sinks, if the call has any; differentiated too.
        tokens_first: whether inputs are `[B, N, H, D]` instead of `[B, H, N, D]`.
    """

    forward: Callable[[], Tensor]
    inputs: Tensors
    sinks: Tensor | None = None
    tokens_first: bool = False

    def __call__(self) -> Tensor:
        return self.forward()

    def gradients(self, out: Tensor, d_out: Tensor) -> Tensors:
        """Gradients of query, key, value, and of the sinks if there are any."""
        leaves = self.inputs[:3] if self.sinks is None else (*self.inputs[:3], self.sinks)
        return torch.autograd.grad(out, leaves, d_out)

    def backward(self, out: Tensor) -> None:
        self.gradients(out, self.inputs[3])


class Competitor(Protocol):
    """Another implementation of attention on the mask of a pattern, for inputs of one shape."""

    name: str

    def take(self, inputs: Tensors) -> None:
        """Attend over other inputs of the same shape; what is compiled stays."""

    def on(
        self, pattern: BandPattern, sinks: Tensor | None = None, offsets: Tensor | None = None
    ) -> Attend:
        """The call on the mask of a pattern; whatever it raises is the reason not to time it. Sinks
        `[H]` have the inputs' dtype. Offsets `[documents + 1]` are the first tokens of the
        documents of a batch of one row, and the row's length; a pattern with a prefix has none."""


def tokens_first(inputs: Tensors) -> Tensors:
    """Copies `[B, N, H, D]` of inputs `[B, H, N, D]`, the first three with gradients."""
    moved = [tensor.detach().transpose(1, 2).contiguous() for tensor in inputs]
    return *(tensor.requires_grad_() for tensor in moved[:3]), moved[3]


def longest_document(offsets: Tensor) -> int:
    """Length of the longest document."""
    return int((offsets[1:] - offsets[:-1]).max())
