"""The choice between the suites of kernels: Hopper where it covers the call, else portable."""

from __future__ import annotations

import torch
import triton

from . import hopper
from .arguments import RowStats
from .call import BackwardTensors, Call, ForwardTensors
from .hopper.planning import has_parts, pitch
from .portable import launch as portable

DECODING = f"decoding kernels (Triton {triton.__version__})"


def describe(call: Call, *inputs: torch.Tensor) -> tuple[str, str | None]:
    """Name of the kernels that run a call on query, key and value, and what the Hopper kernels
    would need instead, or None.
    """
    need = hopper.refusal(call, *inputs)
    if need is not None:
        return f"portable kernels (Triton {triton.__version__})", need
    plan = hopper.plan(call, *inputs)
    others = ""
    if plan is not None and plan.fused_backward:
        others = f"; sums of dQ in {'turn' if call.deterministic else 'any order'}"
    if call.prefix and not has_parts(call):
        others = "; dK and dV of the prefix by the portable kernels"
    if not call.has_one_start:
        others = "; portable kernels for rows that are no documents"
    return f"Hopper kernels (Triton {triton.__version__}): {plan}{others}", None


def forward(call: Call, tensors: ForwardTensors) -> None:
    """Launch the forward pass; fills `out`, `lse` and `remainder`."""
    plan = hopper.plan(call, tensors.query, tensors.key, tensors.value)
    if plan is None:
        portable.forward(call, portable.launches_for(call).forward, tensors)
        return
    if call.has_one_start:
        hopper.kernels().forward(call, plan, tensors)
        return
    described, others = hopper.kernels().find_documents(call)
    hopper.kernels().forward(described, plan, tensors)
    portable.forward(others, portable.launches_for(call).forward, tensors)


def backward(
    call: Call, tensors: BackwardTensors, lse: torch.Tensor, d_lse: torch.Tensor | None
) -> torch.Tensor:
    """Launch the backward pass; fills the gradients and returns `delta` `[B, H, Q]`."""
    plan = hopper.plan(call, tensors.query, tensors.key, tensors.value, tensors.d_out)
    queries = call.queries
    rows = lse
    if plan is not None and pitch(queries) != queries:
        rows = lse.new_empty((call.batch, call.heads, pitch(queries)))
    d_lse = None if d_lse is None else d_lse.contiguous()
    stats = RowStats(lse, d_lse, torch.empty_like(rows), torch.empty_like(rows))
    if plan is None:
        portable.backward(call, portable.launches_for(call), tensors, stats)
        return stats.delta
    if not call.has_one_start:
        described, others = hopper.kernels().find_documents(call)
        hopper.kernels().backward(described, plan, tensors, stats)
        portable.backward(others, portable.launches_for(call), tensors, stats)
        return stats.delta
    hopper.kernels().backward(call, plan, tensors, stats)
    if call.prefix and not has_parts(call):
        launch_config = portable.launches_for(call).key_gradient
        portable.prefix_gradient(call, launch_config, tensors, stats, shared=False)
    return stats.delta[:, :, :queries]
