"""What tests and benchmarks share: the exact result, the plain result, and the error that is allowed between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .attention import band_attention, band_attention_varlen
from .bands import BandPattern
from .impl import reference

Tensors = dict[str, torch.Tensor]


@dataclass
class Case:
    """Inputs of one call. With `cu_seqlens_q` among the options the call is packed, `[T, H, D]`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    pattern: BandPattern
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def packed(self) -> bool:
        return "cu_seqlens_q" in self.options

    def to(self, dtype: torch.dtype) -> Case:
        """The same values in another dtype, sinks included."""
        sinks = self.options.get("sinks")
        options = self.options if sinks is None else {**self.options, "sinks": sinks.to(dtype)}
        tensors = (self.query, self.key, self.value)
        return Case(*(t.to(dtype) for t in tensors), self.pattern, options)


def run(
    case: Case, grads: tuple[torch.Tensor, torch.Tensor] | None = None, **options: Any
) -> Tensors:
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
    out: torch.Tensor,
    lse: torch.Tensor,
    inputs: list[torch.Tensor],
    grads: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """Gradients of inputs; an input that nothing reaches has a gradient of zero."""
    found = torch.autograd.grad(
        [out, lse],
        inputs,
        [grads[0].to(out.dtype), grads[1].to(lse.dtype)],
        allow_unused=True,
    )
    return tuple(torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found))


def exact(case: Case, grads: tuple[torch.Tensor, torch.Tensor] | None = None) -> Tensors:
    """The reference in float64."""
    return run(case.to(torch.float64), grads, impl="reference")


def plain(case: Case, grads: tuple[torch.Tensor, torch.Tensor] | None = None) -> Tensors:
    """The dense masked computation in the case's own dtype with a float32 softmax: the yardstick of rounding error.

    Returns the same entries as `run`, except the log-sum-exp in at least float32.
    """
    options = dict(case.options)
    q, k, v = (t.detach().clone() for t in (case.query, case.key, case.value))
    sinks = options.get("sinks")
    inputs = {"query": q, "key": k, "value": v}
    if sinks is not None:
        inputs["sinks"] = sinks = sinks.detach().clone()
    if grads is not None:
        for tensor in inputs.values():
            tensor.requires_grad_()
    if case.packed:
        mask = reference.packed_mask(
            q, k, case.pattern, options["cu_seqlens_q"], options["cu_seqlens_k"]
        )
        rows = [t.transpose(0, 1)[None] for t in (q, k, v)]
    else:
        start = options.get("query_start")
        start = k.shape[2] - q.shape[2] if start is None else start
        mask = reference.row_mask(q, k, case.pattern, start, options.get("key_start"))
        rows = [q, k, v]
    out, lse = _plain_attention(*rows, mask, options.get("scale"), sinks)
    if case.packed:
        out, lse = out[0].transpose(0, 1), lse[0]
    result = {"out": out.detach(), "lse": lse.detach()}
    if grads is not None:
        found = finite_backward(out, lse, list(inputs.values()), grads)
        result |= {f"d_{name}": grad for name, grad in zip(inputs, found)}
    return result


def _plain_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = ((q @ k.mT).to(work) * scale).masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.to(work)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    empty = (scores == -torch.inf).all(dim=-1, keepdim=True)
    safe = scores.masked_fill(empty, 0.0)
    weights = torch.softmax(safe, dim=-1).masked_fill(empty, 0.0)[..., : v.shape[2]]
    lse = torch.logsumexp(safe, dim=-1).masked_fill(empty[..., 0], -torch.inf)
    return weights.to(q.dtype) @ v, lse


def check_error(name: str, actual: torch.Tensor, rough: torch.Tensor, truth: torch.Tensor) -> None:
    """Assert `max|actual - truth| <= 2 max|rough - truth| + eps(dtype) max|truth|`, infinities in the same places.

    Args:
        name: what the message calls the tensor.
        actual: the tensor under test; its dtype gives eps.
        rough: the same quantity from `plain`.
        truth: the same quantity in float64.
    """
    truth = truth.double()
    finite = truth.isfinite()
    different = actual.double()[~finite] != truth[~finite]
    assert actual.shape == truth.shape, f"{name}: shape {actual.shape}, expected {truth.shape}"
    assert not actual.isnan().any(), f"{name}: {int(actual.isnan().sum())} NaN"
    assert not different.any(), f"{name}: {int(different.sum())} infinities differ"
    if not finite.any():
        return
    exact_values = truth[finite]
    error = (actual.double()[finite] - exact_values).abs().max().item()
    plain_error = (rough.double()[finite] - exact_values).abs().max().item()
    largest = exact_values.abs().max().item()
    allowed = 2 * plain_error + torch.finfo(actual.dtype).eps * largest
    assert error <= allowed, (
        f"{name}: error {error:.3e} exceeds {allowed:.3e} (plain {plain_error:.3e}, largest {largest:.3e})"
    )


def check_case(case: Case, *, backward: bool = True, seed: int = 0, **options: Any) -> None:
    """Run the case with `options` (such as `impl`) and check every output and gradient against float64."""
    grads = None
    if backward:
        generator = torch.Generator(device=case.query.device).manual_seed(seed)
        shape = (*case.query.shape[:-1], case.value.shape[-1])
        rows = shape[:2][::-1] if case.packed else shape[:3]
        draw = {"generator": generator, "device": case.query.device}
        grads = (
            torch.randn(shape, **draw).to(case.query.dtype),
            torch.randn(rows, **draw),
        )
    truth, rough, actual = exact(case, grads), plain(case, grads), run(case, grads, **options)
    for name in truth:
        check_error(name, actual[name], rough[name], truth[name])
