"""The choice between the suites of kernels: Hopper where it covers the call, else portable."""

from __future__ import annotations

from dataclasses import replace

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
    prefix = ""
    if call.prefix and not has_parts(call):
        prefix = "; dK and dV of the prefix by the portable kernels"
    rows = "" if call.has_one_start else "; portable kernels for rows that are no documents"
    return f"Hopper kernels (Triton {triton.__version__}): {plan}{prefix}{rows}", None


def forward(call: Call, tensors: ForwardTensors) -> None:
    """Launch the forward pass; fills `out` and `lse`."""
    plan = hopper.plan(call, tensors.query, tensors.key, tensors.value)
    if plan is None:
        portable.forward(call, portable.launches_for(call).forward, tensors)
        return
    from .hopper import launch

    if call.has_one_start:
        launch.forward(call, plan, tensors)
        return
    over_documents, described = launch.find_documents(call)
    launch.forward(over_documents, plan, tensors)
    call.positions = call.positions._replace(described=described)
    portable.forward(call, portable.launches_for(call).forward, tensors)


def backward(
    call: Call, tensors: BackwardTensors, lse: torch.Tensor, d_lse: torch.Tensor | None
) -> torch.Tensor:
    """Launch the backward pass; fills the gradients and returns `delta` `[B, H, Q]`."""
    plan = hopper.plan(call, tensors.query, tensors.key, tensors.value, tensors.d_out)
    batch, n_heads, queries = lse.shape
    rows = (batch, n_heads, queries if plan is None else pitch(queries))
    d_lse = None if d_lse is None else d_lse.contiguous()
    stats = RowStats(lse, d_lse, lse.new_empty(rows), lse.new_empty(rows))
    if plan is None:
        portable.backward(call, portable.launches_for(call), tensors, stats)
        return stats.delta
    from .hopper import launch

    if not call.has_one_start:
        over_documents, described = launch.find_documents(call)
        # The preprocess kernel may start, and read offsets, before the kernel that finds them ends.
        launch.backward(over_documents, replace(plan, split_backward=True), tensors, stats)
        call.positions = call.positions._replace(described=described)
        portable.backward(call, portable.launches_for(call), tensors, stats)
        return stats.delta
    launch.backward(call, plan, tensors, stats)
    if call.prefix and not has_parts(call):
        launch_config = portable.launches_for(call).key_gradient
        portable.prefix_gradient(call, launch_config, tensors, stats, shared=False)
    return stats.delta[:, :, :queries]
