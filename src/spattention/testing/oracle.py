"""The exact result, and the plain one: the yardstick of rounding error."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..impl import reference
from .cases import Case, Tensors, run


class Operands(NamedTuple):
    """The operands of a call, packed or not, with a key head for every query head."""

    query: Tensor  # [B, H, Q, D]
    key: Tensor  # [B, H, K, D]
    value: Tensor
    mask: Tensor  # bool [B or 1, H, Q, K]
    scale: float
    sinks: Tensor | None
    group: int  # query heads of a key head of the call
    d_out: Tensor | None  # in query's dtype
    d_lse: Tensor | None  # [B, H, Q]


def operands(case: Case, grads: tuple[Tensor, Tensor] | None) -> Operands:
    """The operands of a case, and gradients of its output and log-sum-exp."""
    q, k, v, options = case.query, case.key, case.value, case.options
    d_out, d_lse = (None, None) if grads is None else grads
    d_out = None if d_out is None else d_out.to(q.dtype)
    if case.packed:
        mask = reference.packed_mask(
            q, k, case.pattern, options["cu_seqlens_q"], options["cu_seqlens_k"]
        )
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        d_out = None if d_out is None else d_out.transpose(0, 1)[None]
        d_lse = None if d_lse is None else d_lse[None]
    else:
        start = options.get("query_start")
        start = k.shape[2] - q.shape[2] if start is None else start
        mask = reference.row_mask(q, k, case.pattern, start, options.get("key_start"))
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scale = options.get("scale")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return Operands(q, k, v, mask, scale, options.get("sinks"), group, d_out, d_lse)


def exact(case: Case, grads: tuple[Tensor, Tensor] | None = None) -> Tensors:
    """The reference in float64."""
    return run(case.to(torch.float64), grads, impl="reference")


def plain(case: Case, grads: tuple[Tensor, Tensor] | None = None) -> Tensors:
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
    q, k, v, mask, scale, sinks, group, d_out, d_lse = operands(case, grads)
    dtype = q.dtype
    work = torch.float64 if dtype == torch.float64 else torch.float32
    scores = ((q @ k.mT).to(work) * scale).masked_fill(~mask, -torch.inf)
    sink = -torch.inf if sinks is None else sinks.to(work)[:, None]
    lse = torch.logaddexp(torch.logsumexp(scores, dim=-1), torch.as_tensor(sink).to(scores))
    base = lse.masked_fill(lse == -torch.inf, 0.0)
    weights = torch.exp(scores - base[..., None])
    out = weights.to(dtype) @ v
    result = {"out": out, "lse": lse}
    if d_out is not None and d_lse is not None:
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
