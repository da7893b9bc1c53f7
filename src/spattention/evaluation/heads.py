"""Statistics of attention heads: entropy, mean distance, and divergence between heads.

The weights are recomputed from the queries and keys that the attention layers receive, some queries
at a time: `[B, H, rows, N]` at most, never N x N.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..baselines.adapter import PLAN
from ..compat.huggingface import attention_name
from ..hf.config import NAME as BANDS
from ..hf.decoder import plan_of
from ..hf.sinks import current_sinks

ROWS = 64  # queries at a time
STOCK = ("sdpa", "eager")


@dataclass(frozen=True)
class LayerHeads:
    """Means over queries, in the layer's order of heads.

    Attributes:
        entropy: entropy of a head's weights in nats; log(n) for n keys of equal weight. A sink
            counts as one more key. Queries without keys are left out.
        distance: mean distance in tokens from query to key, weighted by attention.
        divergence: Jensen-Shannon divergence of all heads in nats, 0 to log(H): the entropy of
            their mean minus the mean of their entropies.
    """

    entropy: tuple[float, ...]
    distance: tuple[float, ...]
    divergence: float


def look_at_heads(model: Any, ids: torch.Tensor) -> list[LayerHeads]:
    """Run a causal language model once and measure each layer's heads.

    Args:
        model: a model of Transformers with stock attention, bands or a baseline, on any device.
        ids: int64 `[B, N]`, whole rows without padding.

    Raises:
        ValueError: for another attention implementation, or layers with windows of their own.
    """
    name = attention_name(model.config.get_text_config())
    if name not in STOCK and name != BANDS and not _has_baseline(model):
        raise ValueError(f"`model` must have stock attention, bands or a baseline, got {name!r}")
    model.eval()
    found: list[LayerHeads] = []
    # Stock attention is looked at through SDPA: "eager" is not among the registered functions.
    stock = name in STOCK
    if stock:
        model.set_attn_implementation("sdpa")
    try:
        with torch.no_grad(), _watched("sdpa" if stock else name, found):
            model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        if stock:
            model.set_attn_implementation(name)
    return found


def _has_baseline(model: Any) -> bool:
    return any(hasattr(module, PLAN) for module in model.modules())


@contextmanager
def _watched(name: str, found: list[LayerHeads]) -> Iterator[None]:
    """Replace the attention function by one that also adds statistics to `found`."""
    attend = ALL_ATTENTION_FUNCTIONS[name]

    def watched(
        module: Any, query: torch.Tensor, key: torch.Tensor, *rest: Any, **more: Any
    ) -> Any:
        window, plan = more.get("sliding_window"), plan_of(module)
        if window is not None and (plan is None or plan.pattern is None):
            raise ValueError(f"layers must not have windows of their own, got {window}")
        found.append(_measure(module, query, key, more.get("scaling"), more.get("s_aux")))
        return attend(module, query, key, *rest, **more)

    ALL_ATTENTION_FUNCTIONS[name] = watched
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


def _measure(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float | None,
    own_sinks: torch.Tensor | None,
) -> LayerHeads:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    length, heads = query.shape[2], query.shape[1]
    totals = torch.zeros(3, heads, dtype=torch.float64, device=query.device)
    divergence = torch.zeros(2, dtype=torch.float64, device=query.device)
    for start in range(0, length, ROWS):
        stop = min(start + ROWS, length)
        weights = _weights(module, query, key, scale, own_sinks, start, stop)  # [B, H, rows, N + 1]
        there = weights.sum(dim=-1) > 0.5  # rows without keys and sinks are zero
        entropy = _entropy(weights)
        distance = torch.arange(start, stop, device=query.device)[:, None] - torch.arange(
            length, device=query.device
        )
        attended = weights[..., :length]
        share = attended.sum(dim=-1).clamp_min(torch.finfo(attended.dtype).tiny)
        far = (attended * distance).sum(dim=-1) / share
        for row, values in enumerate((entropy, far, torch.ones_like(far))):
            totals[row] += (values * there).sum(dim=(0, 2)).double()
        several = there.sum(dim=1).clamp_min(1)
        mixed = _entropy(weights.sum(dim=1) / several[..., None])
        gap = mixed - (entropy * there).sum(dim=1) / several
        divergence[0] += gap.sum().double()
        divergence[1] += gap.numel()
    counts = totals[2].clamp_min(1)
    return LayerHeads(
        tuple((totals[0] / counts).tolist()),
        tuple((totals[1] / counts).tolist()),
        float(divergence[0] / divergence[1]),
    )


def _weights(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    own_sinks: torch.Tensor | None,
    start: int,
    stop: int,
) -> torch.Tensor:
    """Weights of queries `start` to `stop`, the sink's last: float32 `[B, H, rows, N + 1]`."""
    baseline = getattr(module, PLAN, None)
    if baseline is not None:
        weights = baseline.weights(query, key, scale, start, stop)
        return torch.nn.functional.pad(weights, (0, 1))
    length, heads = key.shape[2], query.shape[1]
    key = key.repeat_interleave(heads // key.shape[1], dim=1).float()
    scores = (query[:, :, start:stop].float() @ key.mT) * scale
    plan = plan_of(module) if attention_name(module.config) == BANDS else None
    sinks = scores.new_full((heads,), -torch.inf) if own_sinks is None else own_sinks.float()
    if plan is None or plan.pattern is None:
        position = torch.arange(length, device=query.device)
        mask = (position <= position[start:stop, None])[None]
    else:
        rows = stop - start
        mask = plan.pattern.mask(rows, length, query_start=start, device=query.device)
        sinks = current_sinks(module).float() if plan.sinks else sinks
    scores = scores.masked_fill(~mask, -torch.inf)
    column = sinks[:, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], dim=-1).softmax(dim=-1).nan_to_num(0.0)


def _entropy(weights: torch.Tensor) -> torch.Tensor:
    return -torch.special.xlogy(weights, weights).sum(dim=-1)
