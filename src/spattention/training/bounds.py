"""Smallest and largest values of the numbers that decide a run.

A number beyond them is a slip or an attack: it would crash the process or fill the memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..data.bounds import LARGEST_VOCABULARY
from ..files import shown


class Bounds(NamedTuple):
    """An interval of numbers; each end belongs to it unless it is open."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def hold(self, value: float) -> bool:
        """True if the value lies in the interval; NaN lies in none."""
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"{left}{self.low:,}, {self.high:,}{right}"


COUNT = Bounds(1, 10**9)
BOUNDS = {
    "layers": Bounds(1, 1024),
    "vocabulary": Bounds(1, LARGEST_VOCABULARY),
    "held_out": Bounds(0, 1, open_high=True),
    "end_of_text": Bounds(0, 2**16 - 1),
    "context": Bounds(2, 2**24),
    "steps": COUNT,
    "first_steps": COUNT,
    "batch": Bounds(1, 2**16),
    "micro_batch": Bounds(1, 2**16),
    "learning_rate": Bounds(0, 10, open_low=True),
    "final_learning_rate": Bounds(0, 1),
    "warmup": Bounds(0, 10**9),
    "weight_decay": Bounds(0, 10),
    "beta1": Bounds(0, 1, open_high=True),
    "beta2": Bounds(0, 1, open_high=True),
    "epsilon": Bounds(0, 1, open_low=True),
    "clip": Bounds(0, 10**6, open_low=True),
    "balance_loss": Bounds(0, 1000),
    "z_loss": Bounds(0, 1000),
    "seed": Bounds(0, 2**32 - 1),
    "shard_size": Bounds(0, 2**16),
    "workers": Bounds(0, 128),
    "threads": Bounds(0, 1024),
    "log_every": COUNT,
    "evaluate_every": COUNT,
    "validation_windows": Bounds(0, 10**9),
    "save_every": COUNT,
    "keep": Bounds(1, 10**6),
    "divergence": Bounds(0, 1000),
    "peak_tflops": Bounds(0, 10**6, open_low=True),
}


def check_bounds(values: object, names: Iterable[str]) -> None:
    """Raise ValueError for the first attribute that is neither None nor within its bounds."""
    for name in names:
        value = getattr(values, name)
        if value is not None and not BOUNDS[name].hold(value):
            raise ValueError(f"`{name}` must be in {BOUNDS[name]}, got {shown(value)}")
