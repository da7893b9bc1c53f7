"""The hardware's limit of an attention call: matrix products and bytes that no call can avoid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..bands import BandPattern


@dataclass(frozen=True)
class Work:
    """Compulsory work of a call.

    Args:
        flops: floating-point operations of the matrix products of attended pairs.
        moved: bytes of the inputs and results, each read or written once in a pass.
    """

    flops: int
    moved: int

    def limit(self, matrix: float, copy: float) -> float:
        """Milliseconds that the call takes at least.

        Args:
            matrix: rate of matrix products, TFLOP/s.
            copy: rate of a copy, TB/s, bytes read and bytes written.
        """
        return max(self.flops / matrix, self.moved / copy) / 1e9


def work_of(
    pattern: BandPattern, lengths: Sequence[int], query: Tensor, key: Tensor
) -> tuple[Work, Work]:
    """Work of the forward pass, and of a forward and a backward pass.

    A pair costs two products forward and five backward. Forward moves three inputs and the output;
    backward moves these, the output's gradient and three gradients. Bytes of the log-sum-exp are
    not counted.

    Args:
        pattern: the bands; one per query head.
        lengths: tokens of each batch entry, or of each document.
        query: its number of elements and dtype are those of the output and both gradients.
        key: its number of elements and dtype are those of value and both gradients.
    """
    pairs = sum(sum(pattern.pairs(length)) for length in lengths)
    flops = 4 * query.shape[-1] * pairs
    moved = 2 * (query.nbytes + key.nbytes)
    return Work(flops, moved), Work(7 * flops // 2, 3 * moved)
