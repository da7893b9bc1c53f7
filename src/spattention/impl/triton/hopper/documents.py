# mypy: allow-untyped-defs
"""Offsets of the documents that first keys per query, `key_start` `[B, Q]`, describe.

The Hopper kernels run documents by their offsets. A row describes documents where each query sees
keys from its document's first token on: then the first keys of a document's queries are the index
of the first of these queries. The host cannot know that without waiting for the GPU. So this kernel
looks, and writes offsets, or none; and the portable kernels, which are launched after those for
Hopper, find out whether a row is left to them.
"""

import triton
import triton.language as tl

# First keys that the program of a row reads at a time.
CHUNK = tl.constexpr(4096)


@triton.jit
def first_keys(p_start, o_query, stride, n_queries):
    """First keys of queries, clamped to `[0, n_queries]`; -1 before the first query."""
    m_query = (o_query >= 0) & (o_query < n_queries)
    o_first = tl.load(p_start + o_query.to(tl.int64) * stride, mask=m_query, other=0)
    o_first = tl.minimum(tl.maximum(o_first, 0), n_queries)
    return tl.where(o_query < 0, -1, o_first)


@triton.jit
def starts_of_documents(p_start, first, stride, n_queries):
    """Queries `[CHUNK]` from `first` on, the mask of those that start a document after the first
    one of their row, and the mask of those whose first key is another token than that start.
    """
    o_query = first + tl.arange(0, CHUNK)
    o_first = first_keys(p_start, o_query, stride, n_queries)
    m_start = o_first != first_keys(p_start, o_query - 1, stride, n_queries)
    m_start = m_start & (o_query > 0) & (o_query < n_queries)
    return o_query, m_start, m_start & (o_first != o_query)


@triton.jit(do_not_specialize=["n_queries", "n_documents"])
def documents_kernel(
    p_key_start,
    stride_b,
    stride_t,
    p_offsets_q,
    p_offsets_k,
    p_described,
    n_queries,
    n_documents,
):
    """A program for each row. Writes `n_documents + 1` offsets of its queries and of its keys, and
    1 if they describe the row, else 0 and offsets of empty documents.

    Document 0 has no queries and the keys before the first key of the row: padding. Documents after
    the last one are empty.
    """
    row = tl.program_id(0)
    p_start = p_key_start + row.to(tl.int64) * stride_b
    p_offsets_q += row * (n_documents + 1)
    p_offsets_k += row * (n_documents + 1)
    found = 0 * row
    others = 0 * row
    for first in range(0, n_queries, CHUNK):
        _, m_start, m_other = starts_of_documents(p_start, first, stride_t, n_queries)
        found += tl.sum(m_start.to(tl.int32), 0)
        others += tl.sum(m_other.to(tl.int32), 0)
    # Documents 0 and 1 are always there.
    described = (others == 0) & (found + 2 <= n_documents)
    tl.store(p_described + row, described.to(tl.int32))
    padding = tl.where(described, tl.minimum(tl.maximum(tl.load(p_start), 0), n_queries), 0)
    end = tl.where(described, n_queries, 0)
    count = tl.where(described, found + 2, 2)
    for first in range(0, n_documents + 1, CHUNK):
        o_document = first + tl.arange(0, CHUNK)
        m_document = (o_document < 2) | ((o_document >= count) & (o_document <= n_documents))
        o_offset = tl.where(o_document < 2, 0, end)
        tl.store(p_offsets_q + o_document, o_offset, mask=m_document)
        o_offset = tl.where(o_document == 1, padding, o_offset)
        tl.store(p_offsets_k + o_document, o_offset, mask=m_document)
    done = 2 + 0 * row
    for first in range(0, tl.where(described, n_queries, 0), CHUNK):
        o_query, m_start, _ = starts_of_documents(p_start, first, stride_t, n_queries)
        o_document = done + tl.cumsum(m_start.to(tl.int32), 0) - 1
        tl.store(p_offsets_q + o_document, o_query, mask=m_start)
        tl.store(p_offsets_k + o_document, o_query, mask=m_start)
        done += tl.sum(m_start.to(tl.int32), 0)
