"""Block sizes and warps of the decoding kernels, and the rule that cuts keys into chunks."""

from __future__ import annotations

from collections.abc import Sequence
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
        programs: programs per multiprocessor that run at once; few keys are cut for one such wave.
        longest: keys that a program of that wave reads at most, a multiple of block_n.
        many: keys of a chunk where the programs are more than one wave.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int = 4
    longest: int = 2048
    many: int = 1024

    def chunk(self, spans: Sequence[int], copies: int, multiprocessors: int) -> int:
        """Keys of a chunk: the smallest multiple of `block_n` whose programs all run at once, or
        `many` where that would be more than `longest`.

        Args:
            spans: keys of each range of distances that is cut by itself.
            copies: programs that read each chunk, of all batch entries together.
            multiprocessors: of the GPU.
        """
        most = self.programs * multiprocessors
        for chunk in range(self.block_n, self.longest + 1, self.block_n):
            if copies * sum(-(-n // chunk) for n in spans) <= most:
                return chunk
        return self.many


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
# On Hopper more keys are in flight in fewer programs, whose chunks are merged sooner.
FEW_HALF_HOPPER = FEW_HALF | {
    64: DecodeLaunch(64, 64, 4, 4, programs=2),
    128: DecodeLaunch(64, 64, 4, 3, programs=1),
}
ONE_INTERPRETED = DecodeLaunch(1, 16, 1, 1, longest=32, many=32)
FEW_INTERPRETED = DecodeLaunch(64, 16, 1, 1, longest=32, many=32)
BLOCK_P = 16  # chunks that are merged at a time
MOST_PAGES = 512  # numbers of blocks that a program keeps: 4 for each thread
MERGED_ROWS = 16  # rows of a key/value head up to which one launch decodes


def paged_stages(num_stages: int) -> int:
    """Stages of the loop over a paged cache, with which as many keys are in flight as with
    `num_stages` over a dense one: Triton gives half of them to the numbers of the blocks.
    """
    return 2 * num_stages - 1


def held_pages(launch: DecodeLaunch, page: int) -> int:
    """Numbers of blocks of `page` tokens that a chunk keeps, a power of two; 0 where they would be
    too many.
    """
    if page == 0:
        return 0
    most = (max(launch.longest, launch.many) + page - 2) // page + 1
    return 1 << (most - 1).bit_length() if most <= MOST_PAGES else 0


def merged_rows(rows: int) -> int:
    """Rows that the last program of a key/value head merges, a power of two; 0 where a second
    launch merges them, because one program would take longer.
    """
    return 1 << (rows - 1).bit_length() if rows <= MERGED_ROWS else 0


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
    # With many rows a program has more to multiply than to wait for.
    programs = launch.programs if rows <= MERGED_ROWS else max(2, launch.programs)
    return replace(launch, block_m=min(launch.block_m, block_d(rows)), programs=programs)
