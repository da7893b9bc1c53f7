# mypy: allow-untyped-defs
"""Addresses of keys and values: dense, in the rings of a `BandStore`, or in the blocks of a paged
cache. Legend of `kernels.py`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .. import memory


class KeyHead(NamedTuple):
    """The keys and values of one head of one batch entry.

    `newest` is the token of the newest query, and `length` the number of tokens or the length of a
    ring. `p_pages` points to the entry's row of the block table; the pointers are then those of
    block 0, and `page_stride` leads from block to block. `prefix` is the token of the first key of
    a ring's prefix, which is of the document that starts at position `held`. `pages` are the
    entries of the block table from the block `first_page` on, where `load_pages` has loaded them.
    """

    p_key: Any
    key_stride: Any
    key_page_stride: Any
    p_value: Any
    value_stride: Any
    value_page_stride: Any
    newest: Any
    length: Any
    p_pages: Any
    n_pages: Any
    prefix: Any
    held: Any
    pages: Any
    first_page: Any


@triton.jit
def load_key_head(key, value, positions, counts, batch, key_head, newest, FORM: tl.constexpr):
    """The `KeyHead` of an int32 `key_head`; `newest` is the newest query's position."""
    head = key_head.to(tl.int64)
    p_key, p_value = key.pointer, value.pointer
    # Fields that other forms need: Triton 3.6 has no None in a result.
    p_pages, length, prefix, held = p_key, counts.n_keys, counts.n_keys, counts.n_keys
    if FORM.PAGE > 0:
        p_key += head * key.stride_h
        p_value += head * value.stride_h
        p_pages = positions.pages + batch * counts.pages_stride
    elif FORM.RINGS:
        offset = tl.load(positions.ring_offsets + key_head)
        p_key += batch * key.stride_b + offset * key.stride_t
        p_value += batch * value.stride_b + offset * value.stride_t
        length = tl.maximum(tl.load(positions.ring_lengths + key_head), 1)  # 0 without keys
        newest = (tl.maximum(newest, 0) % length).to(tl.int32)
        length = length.to(tl.int32)
        if FORM.PREFIX > 0:
            prefix = (tl.load(positions.ring_prefixes + key_head) - offset).to(tl.int32)
            held = tl.load(positions.held + batch * counts.held_stride)
    else:
        p_key += batch * key.stride_b + head * key.stride_h
        p_value += batch * value.stride_b + head * value.stride_h
    return KeyHead(
        p_key,
        key.stride_t,
        key.stride_b,
        p_value,
        value.stride_t,
        value.stride_b,
        newest,
        length,
        p_pages,
        counts.n_pages,
        prefix,
        held,
        length,
        length,
    )


@triton.jit
def load_pages(keys, begin, end, FORM: tl.constexpr):
    """The `KeyHead` with the numbers of all blocks of the distances `[begin, end)`.

    Then no address in the loop over keys waits for a load: Triton would give half of the stages to
    the numbers.
    """
    first = (keys.newest - end + 1) // FORM.PAGE
    last = (keys.newest - begin) // FORM.PAGE
    o_page = first + tl.arange(0, FORM.PAGES)
    pages = tl.load(keys.p_pages + o_page, mask=o_page <= last, other=0)
    pages = tl.minimum(tl.maximum(pages, 0), keys.n_pages - 1)
    return KeyHead(
        keys.p_key,
        keys.key_stride,
        keys.key_page_stride,
        keys.p_value,
        keys.value_stride,
        keys.value_page_stride,
        keys.newest,
        keys.length,
        keys.p_pages,
        keys.n_pages,
        keys.prefix,
        keys.held,
        pages,
        first,
    )


@triton.jit
def load_at_distances(keys, o_distance, end, FORM: tl.constexpr):
    """Keys and values `[N, D]` at these distances; zeros from distance `end` on."""
    o_token = keys.newest - o_distance
    if FORM.RINGS:
        o_token = tl.where(o_token < 0, o_token + keys.length, o_token)
    m_token = o_distance < end
    if FORM.PAGES > 0:
        o_page = tl.maximum(o_token // FORM.PAGE - keys.first_page, 0)
        o_page = tl.gather(keys.pages, tl.minimum(o_page, FORM.PAGES - 1), 0)
        return load_from_pages(keys, o_page, o_token, m_token, FORM)
    return load_at_tokens(keys, o_token, m_token, FORM)


@triton.jit
def load_prefix(keys, o_place, o_distance, first, m_key, FORM: tl.constexpr):
    """Keys and values `[N, D]` of places in the prefix of the document that starts at position
    `first`, which are at these distances, and the mask `[N]` of those that are stored.
    """
    if FORM.RINGS:
        in_ring = (first + o_place) % keys.length
        o_token = tl.where(first == keys.held, keys.prefix + o_place, in_ring)
    else:
        o_token = keys.newest - o_distance
        m_key = m_key & (o_token < keys.length)
    b_key, b_value = load_at_tokens(keys, o_token, m_key, FORM)
    return b_key, b_value, m_key


@triton.jit
def load_at_tokens(keys, o_token, m_token, FORM: tl.constexpr):
    """Keys and values `[N, D]` of tokens of the head; zeros where `m_token` `[N]` is false.

    The numbers of the blocks of a paged cache are loaded in the same step. In a loop Triton
    pipelines both loads, each with half of the stages (`config.paged_stages`).
    """
    if FORM.PAGE > 0:
        o_page = tl.load(keys.p_pages + o_token // FORM.PAGE, mask=m_token, other=0)
        o_page = tl.minimum(tl.maximum(o_page, 0), keys.n_pages - 1)
        return load_from_pages(keys, o_page, o_token, m_token, FORM)
    b_key = memory.gather_tokens(keys.p_key, o_token, m_token, keys.key_stride, FORM)
    b_value = memory.gather_tokens(keys.p_value, o_token, m_token, keys.value_stride, FORM)
    return b_key, b_value


@triton.jit
def load_from_pages(keys, o_page, o_token, m_token, FORM: tl.constexpr):
    """Keys and values `[N, D]` of tokens in the blocks `o_page` `[N]` of a paged cache."""
    o_token = o_token % FORM.PAGE
    o_page = o_page.to(tl.int64)[:, None]
    p_key = keys.p_key + o_page * keys.key_page_stride
    p_value = keys.p_value + o_page * keys.value_page_stride
    b_key = memory.gather_tokens(p_key, o_token, m_token, keys.key_stride, FORM)
    b_value = memory.gather_tokens(p_value, o_token, m_token, keys.value_stride, FORM)
    return b_key, b_value
