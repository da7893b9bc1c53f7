"""What decides a run of a comparison, in plain values that go into its results."""

from __future__ import annotations

from dataclasses import dataclass, fields

from .bounds import BOUNDS, check_bounds


@dataclass(frozen=True)
class Settings:
    """What runs must share to be compared: they differ in attention and seed alone.

    Args:
        model: a preset of `spattention.models`.
        layers: decoder layers, instead of the preset's; None keeps them.
        vocabulary: entries of the model's embedding.
        context: tokens per window, and the span of the patterns.
        batch: windows per step.
        steps: optimizer steps.
        learning_rate: its peak; it warms up over a tenth of the steps and falls to a tenth as a
            cosine.
        evaluations: how often the validation loss is taken, the end included.
        validation_windows: windows that it is taken over.
        threads: of each run; 0 for PyTorch's own choice, usually one per core.
        data: digest of the tokens.
    """

    model: str
    layers: int | None
    vocabulary: int
    context: int
    batch: int
    steps: int
    learning_rate: float
    evaluations: int
    validation_windows: int
    threads: int
    data: str

    def __post_init__(self) -> None:
        check_bounds(self, (f.name for f in fields(self) if f.name in BOUNDS))
