"""Useful work of a training step: the numerator of MFU (model FLOP utilisation).

Useful work per token is 6 x active parameters, plus 14 x D per attended (query, key) pair: two
products of the forward pass and five of the backward, each 2 x D. Recomputation does not count.
"""

from __future__ import annotations

from typing import Any

from ..choice import AttentionChoice

# What configurations call the number of experts that a token chooses from.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def active_parameters(model: Any) -> int:
    """Parameters that one token uses: all, except the experts that it does not visit."""
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    config = model.config.get_text_config()
    if not experts:
        return total
    count = next((found for name in EXPERTS if (found := getattr(config, name, None))), None)
    if count is None:
        raise ValueError(f"the model's config must name its experts, one of {', '.join(EXPERTS)}")
    return total - experts * (count - config.num_experts_per_tok) // count


def work_per_token(model: Any, attention: AttentionChoice, context: int) -> float:
    """Useful floating-point operations per token, forward and backward."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = attention.pairs(context) * config.num_hidden_layers / context
    return 6 * active_parameters(model) + 14 * head_dim * pairs
