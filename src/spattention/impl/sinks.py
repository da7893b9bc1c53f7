"""The gradient of sinks."""

from __future__ import annotations

import torch
from torch import Tensor


def sink_gradient(
    sinks: Tensor, d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor
) -> Tensor:
    """`[H]` in the dtype of `lse`, computed head by head to spare memory, from results with sinks,
    `out [B, H, Q, Dv]` and `lse [B, H, Q]`, and their gradients; None stands for zeros."""
    found = []
    for head, sink in enumerate(sinks.to(lse.dtype)):
        log_sum = lse[:, head]
        delta = (d_out[:, head].to(lse.dtype) * out[:, head]).sum(dim=-1)
        if d_lse is not None:
            delta = delta - d_lse[:, head]
        found.append((sink_weight(sink, log_sum) * -delta).sum(dtype=torch.float64))
    return torch.stack(found).to(lse.dtype)


def sink_weight(sink: Tensor, lse: Tensor) -> Tensor:
    """A sink's share of each row's softmax; a sink of -inf has none, also in an empty row."""
    return torch.exp(sink - lse).masked_fill_(sink == -torch.inf, 0.0)
