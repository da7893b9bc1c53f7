"""Summary of the runs of a comparison: one row per attention, with the spread over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median

from ..choice import STOCK


@dataclass(frozen=True)
class Result:
    """Result of a run. Losses in nats per token, memory in bytes, pairs per layer and window."""

    attention: str
    seed: int
    context: int
    parameters: int
    validation_loss: float
    train_losses: list[tuple[int, float]]
    validation_losses: list[tuple[int, float]]
    tokens_per_second: float
    seconds: float
    pairs: int
    memory_before: int | None
    memory_peak: int | None
    memory_kind: str
    order: str
    model: str
    prompt: str | None
    continuation: str | None


@dataclass(frozen=True)
class Row:
    """One attention, over its seeds.

    Args:
        attention: its name.
        context: tokens per window.
        seeds: the seeds whose runs are finished.
        loss: mean validation loss in nats per token.
        difference: mean over the seeds that both have of this loss minus dense's; None without such
            a seed.
        spread: range of the loss over seeds, the larger of this row's and dense's; None with one
            seed.
        tokens_per_second: median over the seeds.
        pairs: attended pairs per layer and window.
        memory_peak: most over the seeds, in bytes.
        memory_growth: most over the seeds of the peak above what was resident before the model was
            made.
    """

    attention: str
    context: int
    seeds: tuple[int, ...]
    loss: float
    difference: float | None
    spread: float | None
    tokens_per_second: float
    pairs: int
    memory_peak: int | None
    memory_growth: int | None

    @property
    def verdict(self) -> str:
        """The difference against the spread between seeds, in words."""
        if self.attention == STOCK or self.difference is None:
            return ""
        if self.spread is None:
            return "seed spread unknown"
        return "within seed spread" if abs(self.difference) <= self.spread else "beyond seed spread"


def summarize(results: Sequence[Result]) -> list[Row]:
    """One row per attention, in the order of the first run of each."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.attention, []).append(result)
    dense = {r.seed: r.validation_loss for r in groups.get(STOCK, [])}
    return [_row(name, runs, dense) for name, runs in groups.items()]


def check_equal_order(results: Sequence[Result]) -> None:
    """Raise RuntimeError unless runs of one seed trained on the same tokens in the same order."""
    orders: dict[int, str] = {}
    for result in results:
        first = orders.setdefault(result.seed, result.order)
        if first != result.order:
            raise RuntimeError(
                f"{result.attention} with seed {result.seed} trained on other data than the runs "
                "before it"
            )


def _row(name: str, runs: Sequence[Result], dense: dict[int, float]) -> Row:
    losses = [run.validation_loss for run in runs]
    shared = [run.validation_loss - dense[run.seed] for run in runs if run.seed in dense]
    ranges = [max(x) - min(x) for x in (losses, list(dense.values())) if len(x) > 1]
    peaks = [run.memory_peak for run in runs if run.memory_peak is not None]
    growths = [
        run.memory_peak - run.memory_before
        for run in runs
        if run.memory_peak is not None and run.memory_before is not None
    ]
    return Row(
        attention=name,
        context=runs[0].context,
        seeds=tuple(run.seed for run in runs),
        loss=mean(losses),
        difference=mean(shared) if shared else None,
        spread=max(ranges) if len(ranges) == 2 else None,
        tokens_per_second=median(run.tokens_per_second for run in runs),
        pairs=runs[0].pairs,
        memory_peak=max(peaks) if peaks else None,
        memory_growth=max(growths) if growths else None,
    )
