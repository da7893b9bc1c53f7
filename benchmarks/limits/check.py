"""What a case computes, and its comparison with float64 on a sample of query rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import spattention as spa
from spattention.benchmarking.attend import Attend, Tensors

ROWS = 64  # query rows that are compared with float64
# Of the norm, in half precision. Sums over all rows cancel in the gradients of sinks.
ERRORS = {"out": 0.02, "d_query": 0.02, "d_key": 0.02, "d_value": 0.02, "d_sinks": 0.05}


@dataclass(frozen=True)
class Task:
    """What a case computes.

    Args:
        inputs: query `[B, H, N, D]`, key and value `[B, Hkv, N, D]`, gradient of the output.
        pattern: its mask.
        sinks: `[H]` or None.
        offsets: of packed documents, int32 `[documents + 1]`, or None.
    """

    inputs: Tensors
    pattern: spa.BandPattern
    sinks: torch.Tensor | None = None
    offsets: torch.Tensor | None = None


def sampled_rows(task: Task) -> torch.Tensor:
    """Query rows to check: the first and last, the edges of documents, and random ones."""
    length = task.inputs[0].shape[2]
    generator = torch.Generator().manual_seed(1)
    chosen = set(torch.randint(length, (ROWS,), generator=generator).tolist()) | {0, length - 1}
    if task.offsets is not None:
        edges = task.offsets[1:-1].tolist()
        chosen |= {row for edge in edges for row in (edge - 1, edge)}
    return torch.tensor(sorted(chosen), device=task.inputs[0].device)


def visible(task: Task, rows: torch.Tensor, heads: slice) -> torch.Tensor:
    """Keys that the rows see, bool `[heads, rows, N]`."""
    distance = rows[:, None] - torch.arange(task.inputs[0].shape[2], device=rows.device)
    first = torch.zeros_like(rows)
    if task.offsets is not None:
        document = torch.searchsorted(task.offsets[1:].contiguous(), rows, right=True)
        first = task.offsets[document].long()
    depth = rows - first
    seen = torch.stack([_in_bands(bands, distance) for bands in task.pattern.intervals[heads]])
    seen |= (distance >= 0) & (depth[:, None] - distance < task.pattern.prefix)
    return seen & (distance <= depth[:, None])


def _in_bands(bands: tuple[tuple[int, int], ...], distance: torch.Tensor) -> torch.Tensor:
    seen = torch.zeros_like(distance, dtype=torch.bool)
    for near, far in bands:
        seen |= (distance >= near) & (distance < far)
    return seen


def exact_by_head(
    task: Task, rows: torch.Tensor
) -> Iterator[tuple[int, int, slice, dict[str, torch.Tensor]]]:
    """Batch entry, key/value head, its query heads, and their output and gradients in float64,
    where only `rows` have a gradient of the output. Rows without keys give 0.
    """
    query, key, value, d_out = task.inputs
    group = query.shape[1] // key.shape[1]
    for head in range(key.shape[1]):
        heads = slice(head * group, head * group + group)
        seen = visible(task, rows, heads)
        has_keys = seen.any(-1)
        seen |= ~has_keys[..., None]  # every key, without weight below
        for entry in range(query.shape[0]):
            q = query[entry, heads][:, rows].detach().double().requires_grad_()
            k, v = (t[entry, head].detach().double().requires_grad_() for t in (key, value))
            scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
            leaves = [q, k, v]
            lse = torch.logsumexp(scores, dim=-1)
            if task.sinks is not None:
                sinks = task.sinks.detach()[heads].double().requires_grad_()
                leaves.append(sinks)
                lse = torch.logaddexp(lse, sinks[:, None])
            weights = torch.exp(scores - lse[..., None]) * has_keys[..., None]
            out = weights @ v
            grads = torch.autograd.grad(out, leaves, d_out[entry, heads][:, rows].double())
            names = ("out", "d_query", "d_key", "d_value", "d_sinks")
            yield entry, head, heads, dict(zip(names, (out.detach(), *grads)))


def check(attend: Attend, task: Task) -> dict[str, float]:
    """Relative errors of output and gradients; RuntimeError if one is too large. Rows without keys
    are not compared: what they give is everyone's own.
    """
    rows = sampled_rows(task)
    query, key, _, gradient = task.inputs
    group = query.shape[1] // key.shape[1]
    has_keys = torch.cat(
        [
            visible(task, rows, slice(head, head + group)).any(-1)
            for head in range(0, query.shape[1], group)
        ]
    )
    d_out = torch.zeros_like(gradient)
    d_out[:, :, rows] = gradient[:, :, rows] * has_keys[..., None]
    out = attend()
    if attend.tokens_first:
        d_out = d_out.transpose(1, 2).contiguous()
    grads = attend.gradients(out, d_out)
    results = [out.detach(), *grads[:3]]
    if attend.tokens_first:
        results = [result.transpose(1, 2) for result in results]
    found = dict(zip(("out", "d_query", "d_key", "d_value"), results))
    off: dict[str, torch.Tensor | float] = defaultdict(float)
    norm: dict[str, torch.Tensor | float] = defaultdict(float)

    def compare(name: str, part: torch.Tensor, truth: torch.Tensor) -> None:
        off[name] += (part.double() - truth).square().sum()
        norm[name] += truth.square().sum()

    d_sinks = torch.zeros(query.shape[1], dtype=torch.float64, device=query.device)
    for entry, head, heads, truth in exact_by_head(task, rows):
        for name in ("out", "d_query"):
            part = found[name][entry, heads][:, rows][has_keys[heads]]
            compare(name, part, truth[name][has_keys[heads]])
        for name in ("d_key", "d_value"):
            compare(name, found[name][entry, head], truth[name])
        if "d_sinks" in truth:
            d_sinks[heads] += truth["d_sinks"]
    if len(grads) == 4:
        compare("d_sinks", grads[3], d_sinks)
    errors = {name: (float(off[name]) / float(norm[name])) ** 0.5 for name in off}
    for name, error in errors.items():
        if not error < ERRORS[name]:
            raise RuntimeError(f"{name} is off by {error:.4f} of its norm")
    return {name: round(error, 5) for name, error in errors.items()}
