"""Cases whose tokens hold NaN or infinity where they must not matter."""

from __future__ import annotations

import torch

from spattention import BandPattern
from spattention.testing import Case, check_error
from spattention.testing.cases import run
from spattention.testing.oracle import exact, plain
from spattention.testing.rounding import noise

PLACES = ("query", "key", "value", "d_out")


def documents(
    pattern: BandPattern,
    ends: tuple[int, ...],
    dtype: torch.dtype,
    head_dim: int,
    key_heads: int,
    device: str = "cpu",
) -> Case:
    """A row of documents that end at `ends`."""
    generator = torch.Generator(device).manual_seed(0)
    starts = [0, *ends[:-1]]
    first = [start for start, end in zip(starts, ends) for _ in range(start, end)]
    tensors = (
        torch.randn(1, heads, ends[-1], head_dim, generator=generator, device=device).to(dtype)
        for heads in (pattern.num_heads, key_heads, key_heads)
    )
    key_start = torch.tensor([first], dtype=torch.int32, device=device)
    return Case(*tensors, pattern, {"key_start": key_start})


def check_hostile(case: Case, place: str, tokens: slice, number: float) -> None:
    """Assert that all outputs and gradients at other tokens are right where `tokens` of `place`
    hold `number`.
    """
    generator = torch.Generator(case.query.device).manual_seed(1)
    d_out = torch.randn(case.query.shape, generator=generator, device=case.query.device)
    d_lse = torch.zeros(case.query.shape[:3], device=case.query.device)
    grads = (d_out.to(case.query.dtype), d_lse)
    truth, rough, deviations = exact(case, grads), plain(case, grads), noise(case, grads)
    tensors = {"query": case.query, "key": case.key, "value": case.value, "d_out": grads[0]}
    changed = tensors[place].clone()
    changed[:, :, tokens] = number
    tensors[place] = changed
    hostile = Case(tensors["query"], tensors["key"], tensors["value"], case.pattern, case.options)
    actual = run(hostile, (tensors["d_out"], d_lse), impl="triton")
    for name in truth:
        found = actual[name].clone()
        found[:, :, tokens] = truth[name][:, :, tokens].to(found.dtype)
        check_error(name, found, rough[name], truth[name], deviations[name])
