# mypy: allow-untyped-defs
"""Store a layer's new keys and values in the caches of all its classes of heads, in one launch.

T tokens        C key/value heads of all classes        D head_dim (inside the kernel BLOCK_D)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..impl.triton.arguments import Form
from ..impl.triton.call import on_device
from ..impl.triton.compiled import CompiledKernelCache, specialization
from ..impl.triton.config import OPTIONS, block_d


class NewTokens(NamedTuple):
    """Keys or values `[T, C, D]`, contiguous in D."""

    pointer: Any
    stride_t: Any
    stride_h: Any


class ClassCache(NamedTuple):
    """The cache `[blocks, heads, block_size, 2 * D]` of a class, contiguous in D, and the slots
    `[T]` of its tokens.
    """

    pointer: Any
    stride_b: Any
    stride_h: Any
    stride_t: Any
    slots: Any


@triton.jit
def store_token(
    key, value, cache, token, head, first, BLOCK_SIZE: tl.constexpr, FORM: tl.constexpr
):
    """Store one token of one head in the cache of its class, whose first head is `first`."""
    slot = tl.load(cache.slots + token).to(tl.int64)
    if slot >= 0:  # a token that only pads the batch has none
        o_dim = tl.arange(0, FORM.BLOCK_D)
        m_dim = o_dim < FORM.HEAD_DIM
        p_key = key.pointer + token * key.stride_t + head * key.stride_h + o_dim
        p_value = value.pointer + token * value.stride_t + head * value.stride_h + o_dim
        p_cache = cache.pointer + slot // BLOCK_SIZE * cache.stride_b
        p_cache += (head - first) * cache.stride_h + slot % BLOCK_SIZE * cache.stride_t + o_dim
        tl.store(p_cache, tl.load(p_key, mask=m_dim), mask=m_dim)
        tl.store(p_cache + FORM.HEAD_DIM, tl.load(p_value, mask=m_dim), mask=m_dim)


@triton.jit(do_not_specialize=("n_heads",))
def store_kernel(key, value, caches, n_heads, CLASSES: tl.constexpr, FORM: tl.constexpr):
    """One token of one head. `CLASSES` are the first head, the head after the last and the block
    size of each class.
    """
    program = tl.program_id(0).to(tl.int64)
    token, head = program // n_heads, program % n_heads
    for part in tl.static_range(len(CLASSES)):
        if (head >= CLASSES[part][0]) & (head < CLASSES[part][1]):
            first, block_size = CLASSES[part][0], CLASSES[part][2]
            store_token(key, value, caches[part], token, head, first, block_size, FORM)


_store = CompiledKernelCache(store_kernel)


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    caches: Sequence[torch.Tensor],
    slots: Sequence[torch.Tensor],
) -> None:
    """Store new keys and values, without a wait or a table on the device.

    Args:
        key: `[T, C, D]` or longer, the heads of the first class, then those of the second.
        value: the same.
        caches: `[blocks, heads, block_size, 2 * D]` of each class.
        slots: `[T]` of each class, `block * block_size + offset`; negative for tokens that only pad
            the batch.
    """
    tokens, (n_heads, head_dim) = slots[0].shape[0], key.shape[1:]
    if tokens == 0:
        return
    assert all(tensor.stride(-1) == 1 for tensor in (key, value, *caches))
    classes, first = [], 0
    for cache in caches:
        classes.append((first, first + cache.shape[1], cache.shape[2]))
        first = classes[-1][1]
    assert first == n_heads
    strides = tuple([tensor.stride() for tensor in (key, value, *caches)])
    with on_device(key.device):
        _store(
            tokens * n_heads,
            (key.device, specialization(key, value, *caches, *slots), strides),
            NewTokens(key, *key.stride()[:2]),
            NewTokens(value, *value.stride()[:2]),
            tuple([_argument(cache, numbers) for cache, numbers in zip(caches, slots)]),
            n_heads,
            CLASSES=tuple(classes),
            FORM=Form(head_dim, block_d(head_dim)),
            num_warps=1,
            **OPTIONS,
        )


def _argument(cache: torch.Tensor, slots: torch.Tensor) -> ClassCache:
    stride_b, stride_h, stride_t, _ = cache.stride()
    return ClassCache(cache, stride_b, stride_h, stride_t, slots)
