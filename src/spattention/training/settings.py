"""Settings of a comparison, plain values that go into its results."""

from __future__ import annotations

from dataclasses import dataclass, fields

from .bounds import BOUNDS, check_bounds


@dataclass(frozen=True)
class Settings:
    """Settings that all runs of a comparison share; they differ in attention and seed alone.

    Args:
        model: a preset of `spattention.models`.
        layers: decoder layers, instead of the preset's; None keeps them.
        vocabulary: entries of the model's embedding.
        context: tokens per window, and the span of the patterns.
        batch: windows per step.
        steps: optimizer steps.
        learning_rate: peak learning rate; warm-up over a tenth of the steps, cosine decay to a
            tenth.
        evaluations: number of validation losses, the one at the end included.
        validation_windows: windows of a validation loss.
        threads: CPU threads of each run; 0 for PyTorch's choice, usually one per core.
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
