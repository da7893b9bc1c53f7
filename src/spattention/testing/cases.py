"""One call of an operator: its inputs, its results and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..attention import band_attention, band_attention_varlen
from ..bands import BandPattern

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Inputs of one call. With `cu_seqlens_q` among the options the call is packed, `[T, H, D]`."""

    query: Tensor
    key: Tensor
    value: Tensor
    pattern: BandPattern
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def packed(self) -> bool:
        return "cu_seqlens_q" in self.options

    def cpu(self) -> Case:
        """The same case on the CPU."""
        options = {
            name: value.cpu() if isinstance(value, Tensor) else value
            for name, value in self.options.items()
        }
        return Case(self.query.cpu(), self.key.cpu(), self.value.cpu(), self.pattern, options)

    def to(self, dtype: torch.dtype) -> Case:
        """The same values in another dtype, sinks included."""
        sinks = self.options.get("sinks")
        options = self.options if sinks is None else {**self.options, "sinks": sinks.to(dtype)}
        query, key, value = (t.to(dtype) for t in (self.query, self.key, self.value))
        return Case(query, key, value, self.pattern, options)


def run(case: Case, grads: tuple[Tensor, Tensor] | None = None, **options: Any) -> Tensors:
    """`out`, `lse` and, given gradients `(d out, d lse)`, those of query, key, value and sinks."""
    names = ["query", "key", "value"]
    inputs = [
        t.detach().clone(memory_format=torch.preserve_format)
        for t in (case.query, case.key, case.value)
    ]
    kwargs = {**case.options, **options}
    if kwargs.get("sinks") is not None:
        kwargs["sinks"] = kwargs["sinks"].detach().clone()
        names.append("sinks")
        inputs.append(kwargs["sinks"])
    if grads is not None:
        for tensor in inputs:
            tensor.requires_grad_()
    call: Callable[..., Any] = band_attention_varlen if case.packed else band_attention
    out, lse = call(*inputs[:3], case.pattern, return_lse=True, **kwargs)
    result = {"out": out.detach(), "lse": lse.detach()}
    if grads is not None:
        found = finite_backward(out, lse, inputs, grads)
        result |= {f"d_{name}": grad for name, grad in zip(names, found)}
    return result


def finite_backward(
    out: Tensor, lse: Tensor, inputs: list[Tensor], grads: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of inputs; an input that nothing reaches has a gradient of zero."""
    found = torch.autograd.grad(
        [out, lse], inputs, [grads[0].to(out.dtype), grads[1].to(lse.dtype)], allow_unused=True
    )
    return tuple(torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found))
