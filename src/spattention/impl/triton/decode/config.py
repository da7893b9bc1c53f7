"""Block sizes and warps of the decoding kernels, and the rule that cuts keys into chunks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..config import block_d


@dataclass(frozen=True)
class DecodeLaunch:
    """The launch for few queries, and the rule that cuts their keys into chunks.

    Args:
        block_m: queries of a block; 1 sums products in registers, 16 and more are matrix products.
        block_n: keys of a block.
        num_warps: warps of a program.
        num_stages: blocks of keys in flight.
        programs: programs per multiprocessor that short bands are cut for.
        longest: keys that a program reads at most, a power of two times block_n.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int = 8
    longest: int = 512

    def chunk(self, keys: int, multiprocessors: int) -> int:
        """Keys of a chunk: `block_n` times the smallest power of two that leaves no more than
        `programs` chunks for each multiprocessor, at most `longest`.

        Args:
            keys: of all key/value heads of all batch entries together.
            multiprocessors: of the GPU.
        """
        chunk = self.block_n
        while chunk < self.longest and keys > chunk * self.programs * multiprocessors:
            chunk *= 2
        return chunk


# One query per key/value head in single precision, by BLOCK_D.
ONE_SINGLE = {
    16: DecodeLaunch(1, 128, 4, 1),
    32: DecodeLaunch(1, 64, 4, 1),
    64: DecodeLaunch(1, 64, 4, 1),
    128: DecodeLaunch(1, 32, 4, 1),
    256: DecodeLaunch(1, 16, 4, 1),
}
# Several queries, or any number in half precision, with the most queries that a block may have.
FEW_HALF = {
    16: DecodeLaunch(64, 64, 4, 2),
    32: DecodeLaunch(64, 64, 4, 2),
    64: DecodeLaunch(64, 64, 4, 2),
    128: DecodeLaunch(64, 64, 4, 2),
    256: DecodeLaunch(32, 32, 4, 2),
}
FEW_SINGLE = {
    16: DecodeLaunch(32, 32, 4, 1),
    32: DecodeLaunch(32, 32, 4, 1),
    64: DecodeLaunch(32, 32, 4, 1),
    128: DecodeLaunch(16, 16, 4, 1),
    256: DecodeLaunch(16, 16, 4, 1),
}
# On Hopper another block of keys is in flight.
FEW_HALF_HOPPER = FEW_HALF | {128: DecodeLaunch(64, 64, 4, 3)}
ONE_INTERPRETED = DecodeLaunch(1, 16, 1, 1, longest=32)
FEW_INTERPRETED = DecodeLaunch(64, 16, 1, 1, longest=32)
BLOCK_P = 16  # chunks that are combined at a time


def decode_launch(
    itemsize: int, head_dim: int, rows: int, capability: tuple[int, int] | None
) -> DecodeLaunch:
    """The launch for few queries: they are rows of matrix products, at least 16 at once and at most
    what the table says.

    A single row sums in registers, but only in single precision. In half precision the tensor
    cores, though 15 of 16 rows are empty, keep the keys streaming best.

    Args:
        itemsize: bytes of an element, 2 or 4.
        head_dim: 1 to 256.
        rows: queries that share a key/value head.
        capability: CUDA compute capability; None for Triton's interpreter.
    """
    width = block_d(head_dim)
    if rows == 1 and (itemsize == 4 or capability is None):
        return ONE_INTERPRETED if capability is None else ONE_SINGLE[width]
    if capability is None:
        launch = FEW_INTERPRETED
    elif itemsize == 4:
        launch = FEW_SINGLE[width]
    else:
        launch = (FEW_HALF_HOPPER if capability[0] == 9 else FEW_HALF)[width]
    return replace(launch, block_m=min(launch.block_m, block_d(rows)))
