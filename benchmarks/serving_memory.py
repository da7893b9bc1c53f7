"""Blocks of a paged cache that requests hold, as an engine frees them by class of heads."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import spattention as spa
from spattention.serving.head_classes import HeadClass, head_classes

SHORTEST, LONGEST = 2048, 65536  # tokens of a request
SPREAD = 0.8  # standard deviation of the logarithm of its tokens
BLOCK = 16  # tokens of a block of the class with the most heads


@dataclass(frozen=True)
class ClassBlocks:
    """One class of key/value heads, and the tokens of its blocks, whose bytes are those of any."""

    part: HeadClass
    tokens: int

    def freed(self, length: int) -> int:
        """Blocks in front of the window of a request's newest token, which makes this length."""
        return max(0, length - self.part.window) // self.tokens

    def held(self, length: int) -> int:
        """Blocks that a request of this length has."""
        return -(-length // self.tokens) - self.freed(length)


def class_blocks(pattern: spa.BandPattern, kv_heads: int) -> list[ClassBlocks]:
    """The classes of one layer."""
    (classes,) = head_classes([pattern], kv_heads)
    most = max(len(part.kv_heads) for part in classes)
    return [ClassBlocks(part, BLOCK * most // len(part.kv_heads)) for part in classes]


def block_bytes(classes: Sequence[ClassBlocks], head_dim: int, itemsize: int) -> int:
    """Bytes of any block."""
    return len(classes[0].part.kv_heads) * classes[0].tokens * 2 * head_dim * itemsize


def request_bytes(classes: Sequence[ClassBlocks], length: int, head_dim: int, itemsize: int) -> int:
    """Bytes of one layer that a request of this length holds."""
    held = sum(one.held(length) for one in classes)
    return held * block_bytes(classes, head_dim, itemsize)


def draw_lengths(count: int, seed: int) -> list[int]:
    """Tokens of requests: log-normal around the middle of the shortest and the longest."""
    rng, middle = random.Random(seed), (SHORTEST * LONGEST) ** 0.5
    drawn = (middle * rng.lognormvariate(0, SPREAD) for _ in range(count))
    return [round(min(max(length, SHORTEST), LONGEST)) for length in drawn]


def admitted(
    lengths: Sequence[int],
    classes: Sequence[ClassBlocks],
    memory: int,
    head_dim: int,
    itemsize: int,
) -> int:
    """How many of the first requests fit into the memory of one layer at once."""
    used = 0
    for count, length in enumerate(lengths):
        used += request_bytes(classes, length, head_dim, itemsize)
        if used > memory:
            return count
    raise ValueError(f"`lengths` must fill the memory of {memory:,} bytes, got {used:,} of them")
