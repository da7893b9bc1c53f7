"""The rows of the table: which patterns a converted model gets, with sinks or LoRA or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import spattention as spa
from spattention.bands import BandPattern
from spattention.fitting import Profile, sliding_window

PREFIX = 4
NARROW, WIDE = 128, 512  # windows of mixes as practice has them: with sinks, and without
WEIGHTS = (0.0, 0.05, 0.2, 0.3, 0.5)  # of needles, beside the default


@dataclass(frozen=True)
class Budget:
    """Sizes that all rows share: pairs at `length`, patterns for contexts up to `span`."""

    pairs: float
    length: int
    span: int

    def options(self) -> dict[str, Any]:
        return {"pairs": self.pairs, "length": self.length, "span": self.span}


@dataclass(frozen=True)
class Row:
    """A way to convert the model.

    Attributes:
        patterns: of a profile and a budget; None for a model that stays dense.
        sinks: give each head a sink that starts from the measured score of the first tokens.
        lora: train low-rank adapters instead of all weights.
        teacher: share of the loss that is the divergence from the model before it was converted.
        like: the row that has the same patterns, where files of patterns name that one.
    """

    patterns: Callable[[Profile, Budget], Sequence[BandPattern]] | None
    sinks: bool = False
    lora: bool = False
    teacher: float = 0.0
    like: str | None = None


def _all_distances(profile: Profile, budget: Budget) -> Sequence[BandPattern]:
    return [BandPattern.dense(profile.model.heads, budget.span)] * profile.model.layers


def _window(prefix: int = 0) -> Callable[[Profile, Budget], Sequence[BandPattern]]:
    return lambda profile, budget: sliding_window(profile, prefix=prefix, **budget.options())


def _mix(
    narrow: int, *, window: int | None = None, prefix: int = 0
) -> Callable[[Profile, Budget], Sequence[BandPattern]]:
    """`narrow` layers with a window, then a dense one, and so on; by default of the budget."""

    def make(profile: Profile, budget: Budget) -> Sequence[BandPattern]:
        layers, heads = profile.model.layers, profile.model.heads
        dense = [k for k in range(layers) if k % (narrow + 1) == narrow]
        if window is None:
            options = budget.options()
            return sliding_window(profile, prefix=prefix, dense_layers=dense, **options)
        small = BandPattern.sliding_window(heads, budget.span, min(window, budget.span))
        whole = BandPattern.dense(heads, budget.span)
        return [whole if k in dense else small for k in range(layers)]

    return make


def _fitted(
    *,
    groups: bool = False,
    fetch: float | None = None,
    sensitivity: bool = True,
    **options: Any,
) -> Callable[[Profile, Budget], Sequence[BandPattern]]:
    """`spattention.fit`, or an ablation of it.

    Args:
        groups: one choice for all query heads of a key/value head.
        fetch: choose the heads that fetch by their shares on needles alone, times this factor: 0
            lets no head fetch, 3 lets heads with a third.
        sensitivity: False values captured attention alone.
        options: of `fit`.
    """

    def make(profile: Profile, budget: Budget) -> Sequence[BandPattern]:
        if profile.needle is not None and fetch is not None:
            shares = (profile.needle * fetch).clamp(max=1.0)
            profile = replace(profile, needle=shares, needle_sensitivity=None)
        if not sensitivity:
            profile = replace(profile, sensitivity=None, sensitivity_rows=0)
        given = budget.options() | options
        if groups:
            given["kv_heads"] = profile.model.kv_heads
        return spa.fit(profile, **given)

    return make


ROWS: dict[str, Row] = {
    "dense": Row(None),
    "dense-bands": Row(_all_distances),
    "window": Row(_window()),
    "window-sinks": Row(_window(), sinks=True),
    "window-prefix": Row(_window(PREFIX)),
    "5:1-128-sinks": Row(_mix(5, window=NARROW), sinks=True),
    "3:1-128-sinks": Row(_mix(3, window=NARROW), sinks=True),
    "5:1-512": Row(_mix(5, window=WIDE)),
    "3:1-512": Row(_mix(3, window=WIDE)),
    "5:1": Row(_mix(5)),
    "3:1": Row(_mix(3)),
    "5:1-sinks": Row(_mix(5), sinks=True),
    "3:1-sinks": Row(_mix(3), sinks=True),
    "5:1-prefix": Row(_mix(5, prefix=PREFIX)),
    "3:1-prefix": Row(_mix(3, prefix=PREFIX)),
    "fitted": Row(_fitted(prefix=PREFIX)),
    "fitted-groups": Row(_fitted(prefix=PREFIX, groups=True)),
    "fitted-first": Row(_fitted(prefix=PREFIX, dense_layers=(0,))),
    **{f"fitted-retrieval-{w}": Row(_fitted(prefix=PREFIX, retrieval=w)) for w in WEIGHTS},
    "fitted-prefix-sinks": Row(_fitted(prefix=PREFIX), sinks=True, like="fitted"),
    "fitted-sinks": Row(_fitted(), sinks=True),
    "fitted-bare": Row(_fitted()),
    "fitted-shares": Row(_fitted(prefix=PREFIX, fetch=1.0)),
    "fitted-shares-sinks": Row(_fitted(prefix=PREFIX, fetch=1.0), sinks=True),
    "fitted-groups-shares": Row(_fitted(prefix=PREFIX, groups=True, fetch=1.0)),
    "fitted-captured": Row(_fitted(prefix=PREFIX, sensitivity=False)),
    "fitted-no-fetch": Row(_fitted(prefix=PREFIX, fetch=0.0)),
    "fitted-more-fetch": Row(_fitted(prefix=PREFIX, fetch=3.0)),
    "fitted-local-16": Row(_fitted(prefix=PREFIX, local=16)),
    "fitted-local-128": Row(_fitted(prefix=PREFIX, local=128)),
    "fitted-local-256": Row(_fitted(prefix=PREFIX, local=256)),
    "fitted-prefix-1": Row(_fitted(prefix=1)),
    "fitted-prefix-16": Row(_fitted(prefix=16)),
    "dense-lora": Row(None, lora=True),
    "window-prefix-lora": Row(_window(PREFIX), lora=True),
    "fitted-shares-lora": Row(_fitted(prefix=PREFIX, fetch=1.0), lora=True),
    "fitted-lora": Row(_fitted(prefix=PREFIX), lora=True, like="fitted"),
    "dense-teacher": Row(None, teacher=0.5),
    "fitted-teacher": Row(_fitted(prefix=PREFIX), teacher=0.5, like="fitted"),
    "fitted-teacher-alone": Row(_fitted(prefix=PREFIX), teacher=1.0, like="fitted"),
}
