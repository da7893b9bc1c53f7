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
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..compat.huggingface import attention_name
from ..hf.decoder import OWN_IMPLEMENTATIONS, plan_of
from ..hf.head_weights import HeadWeights, causal_weights
from ..hf.section import KINDS

ROWS = 64  # queries at a time


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


def head_statistics(model: Any, ids: Tensor) -> list[LayerHeads]:
    """Run a causal language model of Transformers once, over whole rows `[B, N]` without padding,
    and measure each layer's heads.

    Raises:
        ValueError: for an attention implementation other than stock attention, bands or a baseline,
            or layers with windows of their own.
    """
    name = attention_name(model.config.get_text_config())
    kind = KINDS.get(name)
    if name not in OWN_IMPLEMENTATIONS and (kind is None or kind.weights is None):
        raise ValueError(f"`model` must have stock attention, bands or a baseline, got {name!r}")
    model.eval()
    found: list[LayerHeads] = []
    # Stock attention is looked at through SDPA: "eager" is not among the registered functions.
    stock = name in OWN_IMPLEMENTATIONS
    if stock:
        model.set_attn_implementation("sdpa")
    try:
        with torch.no_grad(), _intercept_attention("sdpa" if stock else name, found):
            model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        if stock:
            model.set_attn_implementation(name)
    return found


def _head_weights(module: Any) -> HeadWeights:
    kind = KINDS.get(attention_name(module.config))
    return causal_weights if kind is None or kind.weights is None else kind.weights


@contextmanager
def _intercept_attention(name: str, found: list[LayerHeads]) -> Iterator[None]:
    """Replace the attention function by one that also adds statistics to `found`."""
    attend = ALL_ATTENTION_FUNCTIONS[name]

    def intercepted(module: Any, query: Tensor, key: Tensor, *rest: Any, **more: Any) -> Any:
        window, plan = more.get("sliding_window"), plan_of(module)
        if window is not None and (plan is None or plan.pattern is None):
            raise ValueError(f"layers must not have windows of their own, got {window}")
        found.append(_measure(module, query, key, more.get("scaling"), more.get("s_aux")))
        return attend(module, query, key, *rest, **more)

    ALL_ATTENTION_FUNCTIONS[name] = intercepted
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]


def _measure(
    module: Any, query: Tensor, key: Tensor, scale: float | None, own_sinks: Tensor | None
) -> LayerHeads:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    recompute = _head_weights(module)
    length, heads = query.shape[2], query.shape[1]
    totals = torch.zeros(3, heads, dtype=torch.float64, device=query.device)
    divergence = torch.zeros(2, dtype=torch.float64, device=query.device)
    for start in range(0, length, ROWS):
        stop = min(start + ROWS, length)
        weights = recompute(  # [B, H, rows, N + 1]
            module, query, key, scale=scale, sinks=own_sinks, start=start, stop=stop
        )
        there = weights.sum(dim=-1) > 0.5  # rows without keys and sinks are zero
        entropy = _entropy(weights)
        position = torch.arange(length, device=query.device)
        distance = position[start:stop, None] - position
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


def _entropy(weights: Tensor) -> Tensor:
    return -torch.special.xlogy(weights, weights).sum(dim=-1)
