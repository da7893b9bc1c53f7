"""A prefix: the first keys that a query may see, in every head that has intervals."""

import pytest
import torch

from spattention import BandPattern, band_attention
from spattention.impl import reference

PATTERN = BandPattern((((0, 2),), ((3, 5),), ()), span=7, prefix=2)


def seen(head: int, position: int, key: int, first: int, pattern: BandPattern = PATTERN) -> bool:
    """The definition, for one query and one key."""
    bands = pattern.intervals[head]
    distance = position - key
    in_band = any(near <= distance < far for near, far in bands)
    in_prefix = bool(bands) and first <= key < first + pattern.prefix and distance >= 0
    return key >= first and (in_band or in_prefix)


@pytest.mark.parametrize("starts", [[0, 3], [-2, 9], [12, 5]])
def test_reference_with_one_start_per_entry(starts):
    """The prefix is the first keys at or after `key_start`, which is clamped to the keys."""
    query, key = torch.empty(2, 3, 9, 4), torch.empty(2, 3, 11, 4)
    position = torch.tensor([2, 5], dtype=torch.int32)
    start = torch.tensor(starts, dtype=torch.int32)
    mask = reference.row_mask(query, key, PATTERN, position, start)
    for b, first in enumerate(starts):
        for h, i, j in torch.cartesian_prod(*map(torch.arange, (3, 9, 11))).tolist():
            assert mask[b, h, i, j] == seen(h, int(position[b]) + i, j, max(0, first))


def test_reference_with_documents_in_a_row():
    """Each document of a row has its own prefix."""
    start = torch.tensor([[0, 0, 0, 3, 3, 4, 4, 4, 4]], dtype=torch.int32)
    tokens = torch.empty(1, 3, 9, 4)
    mask = reference.row_mask(tokens, tokens, PATTERN, 0, start)
    for h, i, j in torch.cartesian_prod(*map(torch.arange, (3, 9, 9))).tolist():
        assert mask[0, h, i, j] == seen(h, i, j, int(start[0, i]))


def test_reference_with_packed_documents():
    """A document's cached keys come first, so its prefix is among them."""
    ends_q, ends_k = (
        torch.tensor(ends, dtype=torch.int32) for ends in ([0, 3, 3, 8], [0, 7, 8, 14])
    )
    query, key = torch.empty(8, 3, 4), torch.empty(14, 3, 4)
    mask = reference.packed_mask(query, key, PATTERN, ends_q, ends_k)
    expected = torch.zeros_like(mask)
    for q0, q1, k0, k1 in zip(ends_q, ends_q[1:], ends_k, ends_k[1:]):
        for h, i, j in torch.cartesian_prod(
            torch.arange(3), torch.arange(q1 - q0), torch.arange(k1 - k0)
        ).tolist():
            position = int(k1 - k0 - (q1 - q0)) + i
            expected[0, h, q0 + i, k0 + j] = seen(h, position, j, 0)
    assert torch.equal(mask, expected)


def test_a_key_of_band_and_prefix_counts_once():
    """Where bands cover the prefix, a pattern computes what it does without one."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 6, 4, generator=generator, dtype=torch.float64)
    args = [tensor[None] for tensor in (query[0], key[0], value[0])]
    dense, prefixed = BandPattern.dense(2, 8), BandPattern.dense(2, 8, prefix=8)
    results = [
        band_attention(*args, pattern, impl="reference", return_lse=True)
        for pattern in (dense, prefixed)
    ]
    for one, other in zip(*results):
        assert torch.equal(one, other)


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
def test_prefixes_that_differ_between_calls_compile(impl):
    """One compiled function takes patterns of any prefix, with their gradients."""
    torch._dynamo.reset()
    attend = torch.compile(band_attention, fullgraph=True, backend="aot_eager")
    for prefix in (0, 3, 5):
        pattern = BandPattern.exclusive(2, 12, prefix=prefix)
        tensors = [torch.randn(1, 2, 30, 4, requires_grad=True) for _ in range(3)]
        results = []
        for function in (attend, band_attention):
            out = function(*tensors, pattern, impl=impl)
            results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
        for found, wanted in zip(*results):
            torch.testing.assert_close(found, wanted)


def test_vmap_keeps_the_prefix():
    pattern = BandPattern.exclusive(2, 12, prefix=5)
    tensors = [torch.randn(3, 2, 2, 30, 4) for _ in range(3)]
    found = torch.func.vmap(lambda q, k, v: band_attention(q, k, v, pattern))(*tensors)
    each = [band_attention(*(t[i] for t in tensors), pattern) for i in range(3)]
    torch.testing.assert_close(found, torch.stack(each))
