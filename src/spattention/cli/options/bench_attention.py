"""Options of `spattention bench attention`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Options:
    """Time attention, forward and forward + backward, beside what one would use otherwise.

    Every pattern is first checked against float64; a wrong kernel is not timed. Times are medians
    of graph replays (the GPU's own time), rested before, and of eager calls; in brackets, those of
    a GPU that has been busy with the same call for 0.4 s: its power limit may slow its clock.
    "Useful" work counts attended pairs alone: 4 D floating-point operations a pair forward and 10 D
    backward. The floor of a case is the larger of useful work over the rate of matrix products that
    take as long as the call, and the bytes that must move over the rate of a copy; both rates are
    measured in the same run.

    Args:
        cases: batch x heads x length, such as 4x16x4096.
        lengths: lengths of the plot, with batch 1 and 16 heads; none for no plot.
        head_dim: D.
        dtype: of query, key and value.
        flex: also time compiled FlexAttention on the same masks (seconds of compilation per case).
        flex_flash: also time FlexAttention on its FLASH back end.
        flash4: also time FlashAttention-4, dense and with block sparsity on the same masks.
        flash_sparse: also time flash-sparse-attn on the same masks.
        seed: Of the random inputs.
        commit: The commit to record, where git cannot tell.
        output: Folder for the results: JSON, a table and a plot, written again after each case.
            Nothing is written without it.
    """

    cases: tuple[str, ...] = ("1x8x4096", "4x16x4096", "16x8x1024", "1x16x16384", "1x16x65536")
    lengths: tuple[int, ...] = (1024, 4096, 16384, 65536)
    head_dim: int = 128
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    flex: bool = True
    flex_flash: bool = True
    flash4: bool = True
    flash_sparse: bool = True
    seed: int = 0
    commit: str | None = None
    output: Path | None = None
