# mypy: allow-untyped-defs
"""Copies of blocks of keys from the pages of a paged cache.

A block of keys is several boxes, each within a page and a slice of the buffer. Its page numbers are
loaded a step ahead: the copy then starts as soon as the buffer is free. A number that is no page
reads as zeros, as TMA reads everything outside a tensor.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import pipeline


class Pages(NamedTuple):
    """The pages of a document: pointer to its row of the block table, and its number of keys."""

    p_numbers: Any
    n_keys: Any


@gluon.jit
def number_at(pages, token, PAGE: gl.constexpr):
    """The page of a token; -1 outside of the document."""
    m_token = (token >= 0) & (token < pages.n_keys)
    return gl.load(pages.p_numbers + token // PAGE, mask=m_token, other=-1)


@gluon.jit
def numbers(pages, start, BOX: gl.constexpr, BLOCK: gl.constexpr, PAGE: gl.constexpr):
    """The pages of the boxes of a block of keys from key `start` on, a multiple of BOX."""
    found = (number_at(pages, start, PAGE),)
    for box in gl.static_range(1, BLOCK // BOX):
        found = found + (number_at(pages, start + box * BOX, PAGE),)  # type: ignore[assignment]  # noqa: RUF005
    return found


@gluon.jit
def copy(
    t_tensor, found, head, start, barrier, s_tokens, pred, BOX: gl.constexpr, PAGE: gl.constexpr
):
    """Start to copy a block of keys of a `[pages, H, PAGE, D]` tensor from the pages that `numbers`
    found.
    """
    for box in gl.static_range(s_tokens.shape[0] // BOX):
        place = (start + box * BOX) % PAGE
        s_box = s_tokens.slice(box * BOX, BOX)
        pipeline.copy_tokens(t_tensor, found[box], head, place, barrier, s_box, pred)
