"""The rows of the table: which patterns a converted model gets, with sinks or LoRA or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import look

import spattention as spa
from spattention.bands import BandPattern
from spattention.fitting import Profile, sliding_window

PREFIX = 4
NARROW, WIDE = 128, 512  # windows of mixes as practice has them: with sinks, and without


@dataclass(frozen=True)
class Budget:
    """Sizes that all rows share: pairs at `length`, patterns for contexts up to `span`.

    `found` holds the sensitivities of trial rows.
    """

    pairs: float
    length: int
    span: int
    found: dict[str, Any] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        return {"pairs": self.pairs, "length": self.length, "span": self.span}


@dataclass(frozen=True)
class Row:
    """A way to convert the model.

    Attributes:
        patterns: of a profile and a budget; None for a model that stays dense.
        sinks: give each head a sink that starts from the measured score of the first tokens.
        lora: train low-rank adapters instead of all weights.
    """

    patterns: Callable[[Profile, Budget], Sequence[BandPattern]] | None
    sinks: bool = False
    lora: bool = False


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


def _fitted(**options: Any) -> Callable[[Profile, Budget], Sequence[BandPattern]]:
    def make(profile: Profile, budget: Budget) -> Sequence[BandPattern]:
        given = dict(options)
        if given.pop("groups", False):
            given["kv_heads"] = profile.model.kv_heads
        return spa.fit(profile, **(budget.options() | given))

    return make


ROWS: dict[str, Row] = {
    "dense": Row(None),
    "window": Row(_window()),
    "window-sinks": Row(_window(), sinks=True),
    "window-prefix": Row(_window(PREFIX)),
    "5:1-128-sinks": Row(_mix(5, window=NARROW), sinks=True),
    "3:1-128-sinks": Row(_mix(3, window=NARROW), sinks=True),
    "5:1-512": Row(_mix(5, window=WIDE)),
    "3:1-512": Row(_mix(3, window=WIDE)),
    "5:1-sinks": Row(_mix(5), sinks=True),
    "3:1-sinks": Row(_mix(3), sinks=True),
    "5:1-prefix": Row(_mix(5, prefix=PREFIX)),
    "3:1-prefix": Row(_mix(3, prefix=PREFIX)),
    "fitted": Row(_fitted(prefix=PREFIX)),
    "fitted-groups": Row(_fitted(prefix=PREFIX, groups=True)),
    "fitted-prefix-sinks": Row(_fitted(prefix=PREFIX), sinks=True),
    "fitted-sinks": Row(_fitted(), sinks=True),
    "fitted-bare": Row(_fitted()),
    "dense-lora": Row(None, lora=True),
    "window-prefix-lora": Row(_window(PREFIX), lora=True),
    "fitted-lora": Row(_fitted(prefix=PREFIX), lora=True),
}


def _trial(kind: str, **options: Any) -> Row:
    def make(profile: Profile, budget: Budget) -> Sequence[BandPattern]:
        given = dict(options)
        if given.pop("groups", False):
            given["kv_heads"] = profile.model.kv_heads
        return look.trial(profile, budget.found, budget.options(), kind=kind, **given)

    return Row(make)


TRIALS: dict[str, Row] = {
    "try-captured": _trial("captured"),
    "try-captured-256": _trial("captured", local=256),
    "try-gate": _trial("gate"),
    "try-gate-64": _trial("gate", local=64),
    "try-bins": _trial("bins"),
    "try-bins-64": _trial("bins", local=64),
    "try-tail": _trial("tail"),
    "try-tail-64": _trial("tail", local=64),
    "try-drops": _trial("drops"),
    "try-drops-fetch.3": _trial("drops", fetches=0.3),
    "try-drops-fetch.3-16": _trial("drops", fetches=0.3, most=16),
    "try-drops-groups-fetch.3": _trial("drops", fetches=0.3, groups=True),
    "try-window-fetch.3-16": _trial("window", fetches=0.3, most=16),
    "try-window-fetch.3": _trial("window", fetches=0.3),
    "try-window-fetch.1": _trial("window", fetches=0.1),
    "try-gate-fetch.3": _trial("gate", fetches=0.3),
    "try-gate-fetch.3-16": _trial("gate", fetches=0.3, most=16),
    "try-bins-fetch.3": _trial("bins", fetches=0.3),
    "try-bins-fetch.3-16": _trial("bins", fetches=0.3, most=16),
    "try-tail-fetch.3": _trial("tail", fetches=0.3),
    "try-tail-fetch.3-16": _trial("tail", fetches=0.3, most=16),
    "try-tail-fetch.1": _trial("tail", fetches=0.1),
    "try-tail-fetch.3-256": _trial("tail", fetches=0.3, local=256),
    "try-tail-groups-fetch.3": _trial("tail", fetches=0.3, groups=True),
    "try-gate-groups-fetch.3": _trial("gate", fetches=0.3, groups=True),
    "try-tail-prefix1-fetch.3": _trial("tail", fetches=0.3, prefix=1),
    "try-tail-prefix16-fetch.3": _trial("tail", fetches=0.3, prefix=16),
}
