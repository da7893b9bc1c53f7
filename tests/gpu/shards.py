"""Shards of a sequence on one GPU, against attention over all of it in float64."""

from __future__ import annotations

import torch

from spattention import BandPattern
from spattention.parallel import Plan
from spattention.testing import Case, check_error, exact, noise, plain
from tests.parallel import in_turns

NAMES = ("out", "d_query", "d_key", "d_value")


def drawn(
    heads: int, key_heads: int, length: int, head_dim: int, dtype: torch.dtype = torch.bfloat16
) -> list[torch.Tensor]:
    """Query, key, value and the gradient of the output."""
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        torch.randn(1, h, length, head_dim, generator=generator, device="cuda").to(dtype)
        for h in (heads, key_heads, key_heads, heads)
    ]


class Budget:
    """The error that one call over all keys may have.

    Args:
        pattern: the bands.
        tensors: of `drawn`.
        options: of `band_attention`.
    """

    def __init__(
        self, pattern: BandPattern, tensors: list[torch.Tensor], **options: torch.Tensor
    ) -> None:
        case = Case(*tensors[:3], pattern, options)
        grads = tensors[3], torch.zeros(tensors[0].shape[:3], device="cuda")
        self.truth, self.rough = exact(case, grads), plain(case, grads)
        self.deviations = noise(case, grads)

    def check(self, plan: Plan, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Output and gradients by the kernels, all ranks in turns, which are within it."""
        found = in_turns.results(plan, tensors, impl="triton")
        for name, mine in zip(NAMES, found):
            check_error(name, mine, self.rough[name], self.truth[name], self.deviations[name])
        return found
