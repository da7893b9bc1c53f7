"""Ways to value what a head attends: trial rows, of which `spattention.fit` keeps the best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from spattention.bands import BandPattern
from spattention.fitting import Profile
from spattention.fitting.allocate import allocate
from spattention.fitting.fit import Task, _runs, _task
from spattention.hf import sensitivity as S


def sensitivity(model: Any, rows: Sequence[Tensor], first: int) -> dict[str, Tensor]:
    name = "trial_sensitivity"

    @contextmanager
    def attention(sums: Any) -> Iterator[None]:
        def forward(
            module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any,
            scaling: float | None = None, **_: Any,
        ) -> tuple[Tensor, None]:  # fmt: skip
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            return S.attend(sums, module, query, key, value, scale), None

        ALL_ATTENTION_FUNCTIONS[name] = forward
        ALL_MASK_ATTENTION_FUNCTIONS[name] = lambda *_, **__: None
        own = model.config._attn_implementation_internal
        model.config._attn_implementation_internal = name
        model.eval()
        try:
            yield
        finally:
            model.config._attn_implementation_internal = own

    sums = S.measure(model, rows, attention, first)
    layers = sorted(sums.gate)
    return {
        kind: torch.stack([getattr(sums, kind)[k] for k in layers]) / sums.queries
        for kind in ("gate", "bins", "tail")
    }


def trial(
    profile: Profile, found: dict[str, Tensor], budget: dict[str, Any], *, kind: str,
    local: int = 128, prefix: int = 4, fetches: float | None = None, most: int | None = None,
    kv_heads: int | None = None,
) -> list[BandPattern]:  # fmt: skip
    """Patterns by one way of valuing; `fetches` is the share of needles that makes a head dense."""
    task: Task = _task(
        profile, budget["pairs"], budget["length"], budget["span"], prefix, local, kv_heads, ()
    )
    dense: list[int] = []
    if fetches is not None and profile.needle is not None:
        share = profile.needle.unflatten(1, (-1, task.group)).amax(dim=2).flatten()
        order = share.argsort(descending=True, stable=True).tolist()
        dense = [u for u in order if float(share[u]) >= fetches][:most]
    if kind == "window":
        return task.patterns(_window(task, dense))
    if kind == "tail":
        return task.patterns(_tails(task, found["tail"], dense))
    values = task.values
    if kind == "gate":
        gate = found["gate"].unflatten(1, (-1, task.group)).sum(dim=2).flatten()
        values = values * gate[:, None]
    elif kind == "bins":
        bins = replace(profile, first=profile.first, distance=_unit(found["bins"], profile))
        values = replace(task, profile=bins, prefix=profile.prefix_max).values
        values = torch.nn.functional.pad(values, (0, task.values.shape[1] - values.shape[1]))
    elif kind == "drops":
        left = torch.nn.functional.pad(found["tail"], (0, 1)).cummin(dim=-1).values
        drops = replace(profile, distance=_unit(left[..., :-1] - left[..., 1:], profile))
        values = replace(task, profile=drops, prefix=profile.prefix_max).values
        values = torch.nn.functional.pad(values, (0, task.values.shape[1] - values.shape[1]))
    forced = torch.tensor([edge < task.local for edge in task.edges[:-1]])
    whole = torch.zeros(len(values), dtype=torch.bool)
    whole[dense] = True
    bins_ = allocate(values, task.costs, forced, task.room, dense=whole)
    return task.patterns([_runs(row, task.edges) for row in bins_.tolist()])


def _unit(values: Tensor, profile: Profile) -> Tensor:
    """Scaled so that a profile takes them as shares."""
    room = 1 - profile.first.sum(-1).max()
    return values / values.sum(-1).max() * room.clamp(min=0.0)


def _window(task: Task, dense: Sequence[int]) -> Any:
    whole = ((0, task.edges[-1]),)
    units = len(task.values)
    low, high = 1, task.edges[-1]
    from spattention.fitting.bins import causal_pairs

    total = causal_pairs(0, task.edges[-1], task.length - task.prefix) * task.group
    while low < high:
        middle = (low + high + 1) // 2
        pairs = causal_pairs(0, middle, task.length - task.prefix) * task.group
        if pairs * (units - len(dense)) + total * len(dense) <= task.room:
            low = middle
        else:
            high = middle - 1
    return [whole if unit in set(dense) else ((0, low),) for unit in range(units)]


def _tails(task: Task, tail: Tensor, dense: Sequence[int]) -> Any:
    """A window for each unit by the lower convex hull of its cost, greedily."""
    cost = tail.unflatten(1, (-1, task.group)).sum(dim=2).flatten(0, 1)
    edges = list(task.profile.edges)
    from spattention.fitting.bins import causal_pairs

    tokens = task.length - task.prefix
    pairs = [causal_pairs(0, min(edge, tokens), tokens) * task.group for edge in edges]
    start = next(k for k, edge in enumerate(edges) if edge >= task.local)
    steps = []
    for unit in range(len(cost)):
        values = [*cost[unit].tolist(), 0.0]
        hull: list[int] = []
        for k in range(start, len(edges)):
            while len(hull) > 1 and (values[hull[-1]] - values[hull[-2]]) * (
                pairs[k] - pairs[hull[-2]]
            ) >= (values[k] - values[hull[-2]]) * (pairs[hull[-1]] - pairs[hull[-2]]):
                hull.pop()
            hull.append(k)
        for a, b in zip(hull, hull[1:]):
            if values[b] < values[a] and pairs[b] > pairs[a]:
                steps.append(((values[b] - values[a]) / (pairs[b] - pairs[a]), unit, a, b))
    at = [start] * len(cost)
    for unit in dense:
        at[unit] = len(edges) - 1
    left = task.room - sum(pairs[k] for k in at)
    stopped = set(dense)
    for _, unit, a, b in sorted(steps):
        if unit in stopped:
            continue
        if pairs[b] - pairs[a] > left:
            stopped.add(unit)
            continue
        at[unit] = b
        left -= pairs[b] - pairs[a]
    return [((0, min(edges[k], task.edges[-1])),) for k in at]
