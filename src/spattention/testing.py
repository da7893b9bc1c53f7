"""What tests and benchmarks share: the exact result, the plain result, and the error that is
allowed between them."""

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

    def cpu(self) -> Case:
        """The same case on the CPU."""
        options = {
            name: value.cpu() if isinstance(value, torch.Tensor) else value
            for name, value in self.options.items()
        }
        return Case(self.query.cpu(), self.key.cpu(), self.value.cpu(), self.pattern, options)

    def to(self, dtype: torch.dtype) -> Case:
        """The same values in another dtype, sinks included."""
        sinks = self.options.get("sinks")
        options = self.options if sinks is None else {**self.options, "sinks": sinks.to(dtype)}
        query, key, value = (t.to(dtype) for t in (self.query, self.key, self.value))
        return Case(query, key, value, self.pattern, options)


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


# Memory orders that a caller may come with, as views of a dense tensor `[B, H, N, D]`.
VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "channels first": lambda tensor: tensor.mT.contiguous().mT,
    "one row for all": lambda tensor: tensor[:1].expand_as(tensor),
    "one head for all": lambda tensor: tensor[:, :1].expand_as(tensor),
    "one token for all": lambda tensor: tensor[:, :, :1].expand_as(tensor),
    "every other channel": lambda tensor: tensor.repeat_interleave(2, dim=-1)[..., ::2],
}


def check_view(
    view: str,
    place: int,
    impl: str,
    *,
    backward: bool = True,
    queries: int = 9,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> None:
    """Assert that an input with strides of its own gives what its contiguous copy gives.

    Args:
        view: one of `VIEWS`.
        place: 0 for query, 1 for key, 2 for value.
        impl: the implementation.
        backward: also the gradients.
        queries: Q, the last of 16 tokens.
        head_dim: D.
        dtype: of the inputs.
        device: of the inputs.
    """
    pattern = BandPattern.shared_local(4, 16)
    results: list[list[torch.Tensor]] = []
    for copied in (False, True):
        generator = torch.Generator().manual_seed(0)
        leaves = [
            torch.randn(2, 4, n, head_dim, generator=generator)
            .to(device, dtype)
            .requires_grad_(backward)
            for n in (queries, 16, 16)
        ]
        query, key, value = (
            VIEWS[view](leaf) if i == place else leaf for i, leaf in enumerate(leaves)
        )
        if copied:
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        out = band_attention(query, key, value, pattern, impl=impl)
        assert isinstance(out, torch.Tensor)
        grads = torch.autograd.grad(out.square().sum(), leaves) if backward else ()
        results.append([out.detach(), *grads])
    for viewed, dense in zip(*results):
        # An expanded input's gradient is a sum, whose order is that of memory. In half precision it
        # may also come from another kernel: the bound is then one of the largest value.
        rtol, atol = 1e-5, 1e-5
        if dtype != torch.float32:
            rtol, atol = 0.0, 1e-2 * max(1.0, float(dense.abs().max()))
        torch.testing.assert_close(viewed, dense, rtol=rtol, atol=atol)


def exact(case: Case, grads: tuple[torch.Tensor, torch.Tensor] | None = None) -> Tensors:
    """The reference in float64."""
    return run(case.to(torch.float64), grads, impl="reference")


def plain(case: Case, grads: tuple[torch.Tensor, torch.Tensor] | None = None) -> Tensors:
    """The dense masked computation in the case's own dtype with a float32 softmax: the yardstick of
    rounding error.

    Its backward is the textbook's, from what every implementation keeps: inputs, output and
    log-sum-exp, each in its own dtype. Returns the same entries as `run`.

    Float32 is computed on the CPU, whose products of up to 128 terms are bit for bit one chain of
    fused multiply-adds (longer ones are summed in blocks of some hundred), as they are in kernels.
    A GPU's library sums small products in several parts, which is finer than one accumulator.
    """
    device = case.query.device
    if case.query.dtype == torch.float32 and device.type != "cpu":
        gradients = None if grads is None else (grads[0].cpu(), grads[1].cpu())
        return {name: t.to(device) for name, t in plain(case.cpu(), gradients).items()}
    options = case.options
    q, k, v, sinks = case.query, case.key, case.value, options.get("sinks")
    if case.packed:
        mask = reference.packed_mask(
            q, k, case.pattern, options["cu_seqlens_q"], options["cu_seqlens_k"]
        )
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    else:
        start = options.get("query_start")
        start = k.shape[2] - q.shape[2] if start is None else start
        mask = reference.row_mask(q, k, case.pattern, start, options.get("key_start"))
    dtype = q.dtype
    work = torch.float64 if dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scale = options.get("scale")
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    scores = ((q @ k.mT).to(work) * scale).masked_fill(~mask, -torch.inf)
    sink = -torch.inf if sinks is None else sinks.to(work)[:, None]
    lse = torch.logaddexp(torch.logsumexp(scores, dim=-1), torch.as_tensor(sink).to(scores))
    base = lse.masked_fill(lse == -torch.inf, 0.0)
    weights = torch.exp(scores - base[..., None])
    out = weights.to(dtype) @ v
    result = {"out": out, "lse": lse}
    if grads is not None:
        d_out, d_lse = grads
        if case.packed:
            d_out, d_lse = d_out.transpose(0, 1)[None], d_lse[None]
        delta = (d_out.to(work) * out.to(work)).sum(dim=-1) - d_lse.to(work)
        d_weights = (d_out @ v.mT).to(work) - delta[..., None]
        d_scores = (weights * d_weights * scale).to(dtype)
        shape = (-1, group)
        result["d_query"] = d_scores @ k
        result["d_key"] = (d_scores.mT @ q).unflatten(1, shape).sum(dim=2)
        result["d_value"] = (weights.to(dtype).mT @ d_out).unflatten(1, shape).sum(dim=2)
        if sinks is not None:
            result["d_sinks"] = -(torch.exp(sink - base) * delta).sum(dim=(0, 2)).to(sinks.dtype)
    if case.packed:
        lse = result.pop("lse")[0]
        tokens_first = {n: t if n == "d_sinks" else t[0].transpose(0, 1) for n, t in result.items()}
        result = tokens_first | {"lse": lse}
    return result


def check_error(name: str, actual: torch.Tensor, rough: torch.Tensor, truth: torch.Tensor) -> None:
    """Assert `max|actual - truth| <= 2 max|rough - truth| + eps(dtype) max|truth|`, infinities in
    the same places. Float64 has no better oracle than float64: 32 eps are added for it.

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
    ulps = 33 if actual.dtype == torch.float64 else 1
    allowed = 2 * plain_error + ulps * torch.finfo(actual.dtype).eps * largest
    assert error <= allowed, (
        f"{name}: error {error:.3e} exceeds {allowed:.3e} (plain {plain_error:.3e}, largest "
        f"{largest:.3e})"
    )


def check_case(case: Case, *, backward: bool = True, seed: int = 0, **options: Any) -> None:
    """Run the case with `options` (such as `impl`) and check every output and gradient against
    float64."""
    grads = None
    if backward:
        generator = torch.Generator(device=case.query.device).manual_seed(seed)
        shape = (*case.query.shape[:-1], case.value.shape[-1])
        rows = shape[:2][::-1] if case.packed else shape[:3]
        d_out, d_lse = (
            torch.randn(size, generator=generator, device=case.query.device)
            for size in (shape, rows)
        )
        grads = (d_out.to(case.query.dtype), d_lse)
    truth, rough, actual = exact(case, grads), plain(case, grads), run(case, grads, **options)
    for name in truth:
        check_error(name, actual[name], rough[name], truth[name])
