"""A recorded schedule is replayed with the blocks that each request holds."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks.serving_steps import Request, scheduled


def test_blocks_are_added_until_a_request_is_resumed() -> None:
    """Decoding requests come first; a resumed request starts with new blocks."""
    first = [[0, 0, 20, True, [[3, 4], [9]]], [1, 0, 1, True, [[5], [8]]]]
    second = [[0, 20, 13, False, [[6], []]], [1, 0, 1, True, [[7], [2]]]]
    found = list(scheduled({"steps": [first, second]}))
    assert [[_plain(request) for request in step] for step in found] == [
        [(1, 0, 1, [[5], [8]]), (0, 0, 20, [[3, 4], [9]])],
        [(1, 0, 1, [[7], [2]]), (0, 20, 13, [[3, 4, 6], [9]])],
    ]
    assert found[1][1].length == 33


def _plain(request: Request) -> tuple[int, int, int, list[list[int]]]:
    blocks = [each.tolist() for each in request.blocks]
    return request.index, request.computed, request.new, blocks
