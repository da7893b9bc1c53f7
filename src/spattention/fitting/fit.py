"""Fit patterns to the profile of a dense model: one per layer, within a budget of pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..bands import BandPattern
from ..scalars import as_int, as_number
from .allocate import allocate
from .bins import causal_pairs, distance_edges, prefix_pairs
from .capture import coverage
from .profile import ModelIdentity, Profile

FETCHES = 0.3  # share of attention on the needle from which on a head fetches it
RETRIEVAL = 0.1  # weight of what answers mind of their needles, beside the loss of all text
LOCAL = 64  # nearest tokens that every head attends by default, if the budget allows that
MIXES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)  # of captured attention into sensitivity


def fit(
    profile: Profile,
    *,
    pairs: float,
    length: int | None = None,
    span: int | None = None,
    prefix: int = 0,
    local: int | None = None,
    kv_heads: int | None = None,
    dense_layers: Iterable[int] = (),
    retrieval: float = RETRIEVAL,
) -> list[BandPattern]:
    """One pattern per layer that keeps most of what a dense model attends within a budget.

    Every head attends its nearest tokens and at most one band further away, or everything. The
    budget goes to the heads and distances of all layers that the loss minds most per pair, if the
    profile has its sensitivity, else to those that capture most attention per pair. If the profile
    knows how much answers mind their needles, this counts as well: a needle is as likely at each
    distance. If it has needles without that, heads that look at them attend everything.

    The patterns never capture less attention than one sliding window of as many pairs. If they
    would, captured attention joins the sensitivities, more and more; then fewer of the heads that
    look at needles attend everything.

    Args:
        profile: of the dense model, from `spattention.hf.profile`.
        pairs: budget, as a share of dense attention's pairs at `length`, above 0 and at most 1.
        length: tokens for which pairs are counted; default and at most the profile's.
        span: of the patterns, in tokens, at least `length`, which is the default. Heads that attend
            up to the end of `length` attend up to the span.
        prefix: first tokens that every head attends as well; at most the profile's `prefix_max`.
        local: nearest tokens that every head attends at least, itself included; default 64, or half
            of the window that the budget allows where that is less.
        kv_heads: the model's key/value heads, if the query heads of one of them are to attend the
            same; default None, a choice for every query head.
        dense_layers: indices of layers whose heads all attend everything, whatever they capture.
        retrieval: weight of the needles, from 0 to 1. 0 leaves them out, 1 counts them alone. The
            default costs little loss and keeps the heads that retrieval rests on.

    Raises:
        ValueError: if the budget cannot be met, or an argument does not fit the profile's model.
    """
    task = _task(
        profile,
        pairs=pairs,
        length=length,
        span=span,
        prefix=prefix,
        local=local,
        kv_heads=kv_heads,
        dense_layers=dense_layers,
        retrieval=retrieval,
    )
    fetching = task.fetching
    window = task.window()
    least = task.value(window)
    while True:
        for values in task.valued:
            found = task.allocate(fetching, values)
            if found is not None and task.value(found) >= least:
                return task.patterns(found)
        if not len(fetching):
            return task.patterns(window)
        fetching = fetching[: len(fetching) * 4 // 5]


def check_budget(model: ModelIdentity, length: int, prefix_max: int, **arguments: Any) -> None:
    """Check arguments of `fit` before a model is profiled, which takes long.

    Args:
        model: to be profiled.
        length: tokens of the longest row.
        prefix_max: first tokens that will be measured.
        arguments: of `fit`, but its profile.

    Raises:
        ValueError: as `fit` would.
    """
    bins = len(distance_edges(length)) - 1
    first = torch.zeros(model.layers, model.heads, prefix_max, dtype=torch.float64)
    distance = torch.zeros(model.layers, model.heads, bins, dtype=torch.float64)
    by_both = first[..., None].expand(*first.shape, bins)
    _task(Profile(model, length, 1, length, "", first, distance, by_both, first), **arguments)


def sliding_window(
    profile: Profile,
    *,
    pairs: float,
    length: int | None = None,
    span: int | None = None,
    prefix: int = 0,
    dense_layers: Iterable[int] = (),
) -> list[BandPattern]:
    """The baseline of `fit`: the longest sliding window, the same in all heads, within the budget.

    Arguments and errors are those of `fit`. With `dense_layers`, the form of models that mix whole
    layers of full attention with layers of sliding windows.
    """
    task = _task(
        profile, pairs=pairs, length=length, span=span, prefix=prefix, dense_layers=dense_layers
    )
    return task.patterns(task.window())


Choice = list[tuple[tuple[int, int], ...]]  # the intervals of each unit of the layers to fit


@dataclass(frozen=True)
class Task:
    """The units to be fitted: heads in the layers that are not dense throughout.

    Attributes:
        profile: of the dense model.
        budget: pairs of all layers and heads.
        length: tokens for which pairs are counted.
        span: of the patterns.
        prefix: first tokens that every head attends.
        local: nearest tokens that every head attends.
        group: query heads per unit.
        dense_layers: layers that attend everything.
        retrieval: weight of the needles.
    """

    profile: Profile
    budget: int
    length: int
    span: int
    prefix: int
    local: int
    group: int
    dense_layers: tuple[int, ...]
    retrieval: float = 0.0

    @cached_property
    def layers(self) -> list[int]:
        """The layers to fit."""
        return [k for k in range(self.profile.model.layers) if k not in self.dense_layers]

    @cached_property
    def edges(self) -> list[int]:
        """Edges of the bins that are chosen from: the profile's, `local`, and the last distance at
        which a key of `length` tokens is not in the prefix.
        """
        last = max(self.local, self.length - self.prefix)
        return sorted({*(edge for edge in self.profile.edges if edge < last), self.local, last})

    @cached_property
    def values(self) -> Tensor:
        """Share of attention of each unit by bin, apart from the prefix: float64 `[U, E]`."""
        return self._by_unit(self.profile.by_distance(self.prefix))

    @property
    def valued(self) -> Iterator[Tensor]:
        """Values to spend the budget by, the best first: `[U, E]` each."""
        minded = self.minded
        if minded is None:
            yield self.values
            return
        for mix in MIXES:
            yield (1 - mix) * minded + mix * _scaled(self.values)

    @property
    def minded(self) -> Tensor | None:
        """How much the loss and the answers mind each bin of each unit: shares `[U, E]`, or None if
        the profile has neither.
        """
        of_loss, of_needles = self.profile.sensitivity, self.profile.needle_sensitivity
        if of_needles is None or not self.retrieval:
            return None if of_loss is None else _scaled(self._by_unit(of_loss))
        loss = self.values if of_loss is None else self._by_unit(of_loss)
        heads = of_needles[self.layers].unflatten(1, (-1, self.group)).sum(dim=2)
        needles = heads.flatten()[:, None] * torch.tensor(self.edges).diff()
        return (1 - self.retrieval) * _scaled(loss) + self.retrieval * _scaled(needles)

    def _by_unit(self, shares: Tensor) -> Tensor:
        """Sums over the heads of each unit, `[L, H, bins of the profile]` to `[U, E]`."""
        shares = shares[self.layers]
        bins = zip(self.edges, self.edges[1:])
        parts = torch.stack([coverage(self.profile.edges, [each]) for each in bins])
        return (shares @ parts.T).unflatten(1, (-1, self.group)).sum(dim=2).flatten(0, 1)

    @cached_property
    def costs(self) -> Tensor:
        """Pairs of each bin for one unit, apart from the prefix: int64 `[E]`."""
        tokens = self.length - self.prefix
        pairs = [causal_pairs(near, far, tokens) for near, far in zip(self.edges, self.edges[1:])]
        return torch.tensor(pairs) * self.group

    @property
    def room(self) -> int:
        """Pairs that are left for bins, apart from dense layers and prefixes."""
        heads = self.profile.model.heads
        whole = len(self.dense_layers) * heads * self.length * (self.length + 1) // 2
        return (
            self.budget - whole - len(self.layers) * heads * prefix_pairs(self.prefix, self.length)
        )

    @cached_property
    def fetching(self) -> list[int]:
        """Units that attend everything because they look at needles, by the largest share of one of
        their heads; none where the values know what answers mind.
        """
        known = self.profile.needle_sensitivity is not None
        if self.profile.needle is None or known or not self.retrieval:
            return []
        share = self.profile.needle[self.layers].unflatten(1, (-1, self.group)).amax(dim=2)
        order = share.flatten().argsort(descending=True, stable=True).tolist()
        return [unit for unit in order if float(share.flatten()[unit]) >= FETCHES]

    def allocate(self, dense: Sequence[int], values: Tensor) -> Choice | None:
        """The best choice by values `[U, E]` in which some units attend everything; None if that is
        too much.
        """
        forced = torch.tensor([edge < self.local for edge in self.edges[:-1]])
        whole = torch.zeros(len(self.values), dtype=torch.bool)
        whole[list(dense)] = True
        if int(((whole[:, None] | forced) * self.costs).sum()) > self.room:
            return None
        bins = allocate(values, self.costs, forced, self.room, dense=whole)
        return [_runs(row, self.edges) for row in bins.tolist()]

    def window(self) -> Choice:
        """The longest window that all units can attend; at least `local`."""
        return [((0, max(self.local, self.longest_window)),)] * len(self.values)

    @property
    def longest_window(self) -> int:
        """Tokens of the longest window that the budget allows all units; 0 if it allows none."""
        units = len(self.layers) * self.profile.model.heads

        def fits(window: int) -> bool:
            return units * causal_pairs(0, window, self.length - self.prefix) <= self.room

        low, high = 0, self.edges[-1]
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    def value(self, choice: Choice) -> float:
        """Share of attention that a choice captures, summed over units, apart from the prefix."""
        inside = torch.stack([coverage(self.edges, head) for head in choice])
        return math.fsum((self.values * inside).sum(dim=1).tolist())

    def patterns(self, choice: Choice) -> list[BandPattern]:
        """One pattern per layer."""
        heads = self.profile.model.heads
        units = heads // self.group
        dense = (((0, self.span),),) * heads
        found = []
        for layer in range(self.profile.model.layers):
            if layer in self.dense_layers:
                found.append(BandPattern(dense, self.span, prefix=self.prefix))
                continue
            first = self.layers.index(layer) * units
            intervals = [
                tuple((near, self.span if far == self.edges[-1] else far) for near, far in head)
                for head in choice[first : first + units]
                for _ in range(self.group)
            ]
            found.append(BandPattern(tuple(intervals), self.span, prefix=self.prefix))
        return found


def _scaled(values: Tensor) -> Tensor:
    """The values as shares of their sum."""
    total = float(values.sum())
    return values / total if total > 0 else values


def _runs(bins: Sequence[bool], edges: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The intervals of chosen bins, neighbours joined."""
    runs: list[tuple[int, int]] = []
    for chosen, near, far in zip(bins, edges, edges[1:]):
        if chosen and runs and runs[-1][1] == near:
            runs[-1] = (runs[-1][0], far)
        elif chosen:
            runs.append((near, far))
    return tuple(runs)


def _task(
    profile: Profile,
    *,
    pairs: float,
    length: int | None = None,
    span: int | None = None,
    prefix: int = 0,
    local: int | None = None,
    kv_heads: int | None = None,
    dense_layers: Iterable[int] = (),
    retrieval: float = 0.0,
) -> Task:
    """The arguments of `fit`, checked."""
    if not isinstance(profile, Profile):
        raise ValueError(f"`profile` must be a Profile, got {type(profile).__name__}")
    model = profile.model
    share = as_number(pairs)
    if share is None or not 0 < share <= 1:
        raise ValueError(f"`pairs` must be a number above 0 and at most 1, got {pairs!r}")
    length = profile.length if length is None else length
    length = _integer("length", length, 1, profile.length, "the profile's longest row")
    span = _integer("span", length if span is None else span, length, None, "`length`")
    prefix = _integer("prefix", prefix, 0, min(profile.prefix_max, length), "what was measured")
    dense = model.layers * model.heads * length * (length + 1) // 2
    budget = math.floor(Fraction(share) * dense)
    layers = _layers(dense_layers, model.layers)
    if local is None:
        bare = Task(profile, budget, length, span, prefix, 1, 1, layers)
        local = max(1, min(LOCAL, bare.longest_window // 2))
    local = _integer("local", local, 1, length, "`length`")
    if kv_heads is not None and as_int(kv_heads) != model.kv_heads:
        raise ValueError(
            f"`kv_heads` must be None or the model's {model.kv_heads} key/value heads, got "
            f"{kv_heads!r}"
        )
    weight = as_number(retrieval)
    if weight is None or not 0 <= weight <= 1:
        raise ValueError(f"`retrieval` must be a number from 0 to 1, got {retrieval!r}")
    group = 1 if kv_heads is None else model.heads // model.kv_heads
    task = Task(profile, budget, length, span, prefix, local, group, layers, weight)
    nearest = prefix_pairs(prefix, length) + causal_pairs(0, local, length - prefix)
    least = dense // model.layers * len(layers) + len(task.layers) * model.heads * nearest
    if least > task.budget:
        raise ValueError(
            f"`pairs` must be at least {math.ceil(10_000 * least / dense) / 10_000} at length "
            f"{length} for {_kept(len(layers), model.layers, local, prefix)}, got {pairs}"
        )
    return task


def _kept(dense: int, layers: int, local: int, prefix: int) -> str:
    """Words for all that a budget must suffice for."""
    nearest = "the nearest token" if local == 1 else f"the nearest {local} tokens"
    first = {0: "", 1: "the first token and "}.get(prefix, f"the first {prefix} tokens and ")
    if dense == layers:
        return f"{dense} of {layers} layers dense"
    if dense:
        return f"{dense} of {layers} layers dense, {first}{nearest} in every other head"
    return f"{first}{nearest} in every head"


def _layers(layers: Iterable[int], count: int) -> tuple[int, ...]:
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise ValueError(f"`dense_layers` must be indices of layers, got {layers!r}")
    given = list(layers)
    found = {k for k in map(as_int, given) if k is not None and 0 <= k < count}
    if len(found) != len(given):
        raise ValueError(
            f"`dense_layers` must be distinct indices from 0 to {count - 1}, got {given}"
        )
    return tuple(sorted(found))


def _integer(name: str, value: object, least: int, most: int | None, bound: str) -> int:
    found = as_int(value)
    if found is None:
        raise ValueError(f"`{name}` must be an integer, got {value!r}")
    if found < least or (most is not None and found > most):
        upper = f" and at most {most} ({bound})" if most is not None else f" ({bound})"
        raise ValueError(f"`{name}` must be at least {least}{upper}, got {found}")
    return found
