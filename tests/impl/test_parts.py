"""Attention over parts of the keys: merged outputs, and each part's share of the gradients."""

from __future__ import annotations

import pytest
import torch

from spattention import BandPattern, band_attention
from spattention.attention import choose
from spattention.impl.attention_call import WholeResults
from spattention.impl.partial import Part, PartResults, merge_into

# Queries and keys of each call: together all pairs, and keys before, at and behind the queries.
CALLS = (((0, 20), (0, 13)), ((20, 29), (0, 13)), ((13, 29), (13, 29)))


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("impl", ["reference", "blockwise", "triton"])
def test_parts_add_up_to_the_whole(impl, with_sinks):
    """Gradients from output and log-sum-exp of all keys, sinks included, part by part."""
    pattern = BandPattern.shared_local(4, 32, widths="geometric", first=2, local=4)
    random = torch.Generator().manual_seed(0)
    q, k, v, d_out = (torch.randn(2, h, 29, 16, generator=random) for h in (4, 2, 2, 4))
    sinks = torch.randn(4, generator=random) if with_sinks else None
    d_lse = torch.randn(2, 4, 29, generator=random)
    inputs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    out, lse = band_attention(*inputs, pattern, sinks=sinks, return_lse=True, impl="reference")
    wanted = torch.autograd.grad((out * d_out).sum() + (lse * d_lse).sum(), inputs)
    out, lse = out.detach(), lse.detach()

    module = choose(impl, q, v)
    total, total_lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf)
    found = [torch.zeros_like(tensor) for tensor in (q, k, v)]
    for (first, last), (start, stop) in CALLS:
        queries, seen = slice(first, last), slice(start, stop)
        keys = [tensor[:, :, seen] for tensor in (k, v)]
        shift = first - start
        edges = zip(pattern.flat[::2], pattern.flat[1::2])
        bands = [(near - shift, far - shift) if near < far else (0, 0) for near, far in edges]
        part = Part(tuple(edge for band in bands for edge in band), 0, 0.25, None)
        results = PartResults(total[:, :, queries], total_lse[:, :, queries])
        module.attend_part(q[:, :, queries], *keys, results, part, merge=first > 0)
        query, *rows = (t[:, :, queries].contiguous() for t in (q, out, lse, d_out, d_lse))
        shares = [torch.empty_like(tensor) for tensor in (query, *keys)]
        module.differentiate_part(query, *keys, WholeResults(*rows), shares, part)
        for gradient, where, share in zip(found, (queries, seen, seen), shares):
            gradient[:, :, where] += share
    if sinks is not None:
        whole = torch.logaddexp(total_lse, sinks[:, None])
        total, total_lse = total * torch.exp(total_lse - whole)[..., None], whole
    close = {"rtol": 0.0, "atol": 2e-5}  # float32
    torch.testing.assert_close(total, out, **close)
    torch.testing.assert_close(total_lse, lse, **close)
    for share, expected in zip(found, wanted):
        torch.testing.assert_close(share, expected, **close)


@pytest.mark.parametrize("impl", ["reference", "blockwise", "triton"])
def test_parts_are_rounded_once(impl):
    """In half precision they are those of float32 outputs, rounded. When each part was rounded
    before they were joined, one number in seven was another."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 64, 16, generator=random).half() for _ in range(3))
    exact = band_attention(q, k, v, BandPattern.dense(4, 64), impl="reference")
    module = choose(impl, q, v)
    found = []
    for dtype in (torch.float16, torch.float32):
        out, lse = torch.empty_like(q, dtype=dtype), torch.empty(q.shape[:3])
        # Where the first part sees no key, the remainder may hold anything.
        remainder = torch.full_like(out, torch.nan) if dtype == torch.float16 else None
        for start, stop in ((32, 64), (0, 32)):
            part = Part((start, 64 + start, 0, 0) * 4, 0, 0.25, None)
            keys = [tensor[:, :, start:stop] for tensor in (k, v)]
            results = PartResults(out, lse, remainder)
            module.attend_part(q, *keys, results, part, merge=start == 0)
        found.append(out)
    assert (found[0] != found[1].half()).double().mean() < 0.002
    torch.testing.assert_close(found[0], exact, rtol=0.0, atol=2e-3)


def test_merging_an_empty_part_changes_nothing():
    out, lse = torch.randn(1, 1, 3, 2), torch.tensor([[[0.5, -torch.inf, 2.0]]])
    out[0, 0, 1] = 0.0
    before = out.clone(), lse.clone()
    part = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    merge_into(PartResults(out, lse), *part)
    assert torch.equal(out, before[0])
    assert torch.equal(lse, before[1])
