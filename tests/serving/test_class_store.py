"""New keys and values of all classes of heads, stored by one launch in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from spattention.serving.paged import write

pytest.importorskip("triton")

HEAD_DIM = 24  # not a power of two


def test_one_launch_stores_as_a_write_per_class() -> None:
    """Classes with blocks of different lengths, keys with strides of their own, tokens that only
    pad the batch, and keys beyond the slots."""
    from spattention.serving.class_store import store

    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(7, 6, 3, HEAD_DIM, generator=generator)  # as of one projection
    key, value = mixed[:, :, 0], mixed[:, :, 2]
    shapes = ((5, 3, 8), (4, 2, 16), (9, 1, 32))
    caches, wanted = (
        [torch.zeros(n, size, heads, 2 * HEAD_DIM).transpose(1, 2) for n, heads, size in shapes]
        for _ in range(2)
    )
    slots = [
        torch.tensor(numbers)
        for numbers in ([16, 9, 39, -1, 20], [17, 18, 63, -1, 30], [100, 33, 200, -1, 64])
    ]
    store(key, value, caches, slots)
    first = 0
    for found, expected, numbers in zip(caches, wanted, slots):
        heads, real = slice(first, first + found.shape[1]), numbers >= 0
        write(key[:5][real][:, heads], value[:5][real][:, heads], expected, numbers[real])
        assert torch.equal(found, expected)
        assert found.count_nonzero() == 4 * found.shape[1] * 2 * HEAD_DIM
        first = heads.stop
