"""Fit patterns to the profile of a dense model: one per layer, within a budget of pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from ..bands import BandPattern
from .allocate import allocate
from .bins import causal_pairs, head_pairs, prefix_pairs
from .capture import coverage
from .profile import Profile

FETCHES = 0.1  # share of attention on the needle from which on a head fetches it


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
) -> list[BandPattern]:
    """One pattern per layer that captures most of a dense model's attention within a budget.

    Every head attends its nearest tokens and at most one band further away, or everything. The
    budget goes to the heads and distances of all layers that capture most attention per pair. If
    the profile has needles, heads that fetch them attend everything, those that fetch most first.

    The patterns never capture less than one sliding window of as many pairs: if they would, fewer
    of the heads that fetch attend everything.

    Args:
        profile: of the dense model, from `spattention.hf.profile`.
        pairs: budget, as a share of dense attention's pairs at `length`, above 0 and at most 1.
        length: tokens for which pairs are counted; default and at most the profile's.
        span: of the patterns, in tokens, at least `length`, which is the default. Heads that attend
            up to the end of `length` attend up to the span.
        prefix: first tokens that every head attends as well; at most the profile's `prefix_max`.
        local: nearest tokens that every head attends at least, itself included; default 1.
        kv_heads: the model's key/value heads, if the query heads of one of them are to attend the
            same; default None, a choice for every query head.
        dense_layers: indices of layers whose heads all attend everything, whatever they capture.

    Raises:
        ValueError: if the budget cannot be met, or an argument does not fit the profile's model.
    """
    task = _task(profile, pairs, length, span, prefix, local, kv_heads, dense_layers)
    fetching = task.fetching
    window = task.window()
    least = task.value(window)
    while True:
        found = task.allocate(fetching)
        if found is not None and task.value(found) >= least:
            return task.patterns(found)
        if not len(fetching):
            return task.patterns(window)
        fetching = fetching[: len(fetching) * 4 // 5]


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
    task = _task(profile, pairs, length, span, prefix, None, None, dense_layers)
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
    """

    profile: Profile
    budget: int
    length: int
    span: int
    prefix: int
    local: int
    group: int
    dense_layers: tuple[int, ...]

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
        shares = self.profile.by_distance(self.prefix)[self.layers]
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
        """Units that fetch needles, by the largest share of one of their heads, largest first."""
        if self.profile.needle is None:
            return []
        share = self.profile.needle[self.layers].unflatten(1, (-1, self.group)).amax(dim=2)
        order = share.flatten().argsort(descending=True, stable=True).tolist()
        return [unit for unit in order if float(share.flatten()[unit]) >= FETCHES]

    def allocate(self, dense: Sequence[int]) -> Choice | None:
        """The best choice in which some units attend everything; None if that is too much."""
        forced = torch.tensor([edge < self.local for edge in self.edges[:-1]])
        whole = torch.zeros(len(self.values), dtype=torch.bool)
        whole[list(dense)] = True
        if int(((whole[:, None] | forced) * self.costs).sum()) > self.room:
            return None
        bins = allocate(self.values, self.costs, forced, self.room, dense=whole)
        return [_runs(row, self.edges) for row in bins.tolist()]

    def window(self) -> Choice:
        """The longest window that all units can attend; at least `local`."""
        units = len(self.values) * self.group

        def fits(window: int) -> bool:
            return units * causal_pairs(0, window, self.length - self.prefix) <= self.room

        low, high = self.local, self.edges[-1]
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return [((0, low),)] * len(self.values)

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
    pairs: float,
    length: int | None,
    span: int | None,
    prefix: int,
    local: int | None,
    kv_heads: int | None,
    dense_layers: Iterable[int],
) -> Task:
    """The arguments of `fit`, checked."""
    if not isinstance(profile, Profile):
        raise ValueError(f"`profile` must be a Profile, got {type(profile).__name__}")
    model = profile.model
    number = isinstance(pairs, int | float) and not isinstance(pairs, bool)
    if not number or not 0 < pairs <= 1:
        raise ValueError(f"`pairs` must be a number above 0 and at most 1, got {pairs!r}")
    length = profile.length if length is None else length
    _check_integer("length", length, 1, profile.length, "the profile's longest row")
    span = length if span is None else span
    _check_integer("span", span, length, None, "`length`")
    _check_integer("prefix", prefix, 0, min(profile.prefix_max, length), "what was measured")
    local = 1 if local is None else local
    _check_integer("local", local, 1, length, "`length`")
    if kv_heads is not None and (type(kv_heads) is not int or kv_heads != model.kv_heads):
        raise ValueError(
            f"`kv_heads` must be None or the model's {model.kv_heads} key/value heads, got "
            f"{kv_heads!r}"
        )
    layers = _layers(dense_layers, model.layers)
    dense = model.layers * model.heads * length * (length + 1) // 2
    group = 1 if kv_heads is None else model.heads // model.kv_heads
    task = Task(
        profile, math.floor(Fraction(pairs) * dense), length, span, prefix, local, group, layers
    )
    least = dense // model.layers * len(layers) + len(task.layers) * model.heads * head_pairs(
        [(0, local)], length, prefix
    )
    if least > task.budget:
        raise ValueError(
            f"`pairs` must be at least {math.ceil(10_000 * least / dense) / 10_000} for "
            f"{len(layers)} of {model.layers} layers dense, the nearest {local} tokens and a "
            f"prefix of {prefix} in every head at length {length}, got {pairs}"
        )
    return task


def _layers(layers: Iterable[int], count: int) -> tuple[int, ...]:
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise ValueError(f"`dense_layers` must be indices of layers, got {layers!r}")
    given = list(layers)
    bad = [k for k in given if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k < count]
    if bad or len(set(given)) != len(given):
        raise ValueError(
            f"`dense_layers` must be distinct indices from 0 to {count - 1}, got {given}"
        )
    return tuple(sorted(given))


def _check_integer(name: str, value: object, least: int, most: int | None, bound: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"`{name}` must be an integer, got {value!r}")
    if value < least or (most is not None and value > most):
        upper = f" and at most {most} ({bound})" if most is not None else f" ({bound})"
        raise ValueError(f"`{name}` must be at least {least}{upper}, got {value}")
