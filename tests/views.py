"""Inputs in every memory order that a caller may come with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spattention import BandPattern, band_attention

# Memory orders that a caller may come with, as views of a dense tensor `[B, H, N, D]`.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
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
    results: list[list[Tensor]] = []
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
        assert isinstance(out, Tensor)
        grads = torch.autograd.grad(out.square().sum(), leaves) if backward else ()
        results.append([out.detach(), *grads])
    for viewed, dense in zip(*results):
        # An expanded input's gradient is a sum, whose order is that of memory. In half precision it
        # may also come from another kernel: the bound is then one of the largest value.
        rtol, atol = 1e-5, 1e-5
        if dtype != torch.float32:
            rtol, atol = 0.0, 1e-2 * max(1.0, float(dense.abs().max()))
        torch.testing.assert_close(viewed, dense, rtol=rtol, atol=atol)
