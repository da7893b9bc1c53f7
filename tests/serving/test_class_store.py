"""New keys and values of all classes of heads, stored by one launch in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from spattention.serving.paged import write

from .class_caches import given

pytest.importorskip("triton")


@pytest.mark.parametrize("head_dim", [16, 24])
def test_one_launch_stores_as_a_write_per_class(head_dim: int) -> None:
    """Classes with blocks of different lengths, keys with strides of their own, tokens that only
    pad the batch, and keys beyond the slots."""
    from spattention.serving.class_store import store

    key, value, caches, slots = given(0, head_dim=head_dim)
    store(key, value, caches, slots)
    first = 0
    for cache, numbers in zip(caches, slots):
        heads, real = slice(first, first + cache.shape[1]), numbers >= 0
        wanted = torch.zeros_like(cache)
        write(key[:5][real][:, heads], value[:5][real][:, heads], wanted, numbers[real])
        assert torch.equal(cache, wanted)
        assert cache.count_nonzero() == 4 * cache.shape[1] * 2 * head_dim
        first = heads.stop
