"""The gradient of sinks, for implementations in plain PyTorch."""

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
        weight = torch.exp(sink - log_sum).masked_fill_(log_sum == -torch.inf, 0.0)
        found.append((weight * -delta).sum(dtype=torch.float64))
    return torch.stack(found).to(lse.dtype)
