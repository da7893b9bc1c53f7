"""Models whose attention is known in closed form, and profiles made by hand."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spattention.fitting import ModelIdentity, Profile
from spattention.fitting.bins import distance_edges

VOCABULARY = 31
STRENGTHS = ((0.0, 1.0, -2.0, 3.0), (2.0, 0.5, 4.0, -1.0))  # layers of heads


def cosine_model(strengths: Any = STRENGTHS) -> Any:
    """A Llama in float64 whose head weighs distance d by `exp(strength * cos(d))`.

    Queries and keys are constant before they are rotated, in heads of two dimensions, which turn by
    one radian per token. Two query heads read one key.
    """
    torch.manual_seed(0)
    layers, heads = len(strengths), len(strengths[0])
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=2 * heads,
        head_dim=2,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        attention_bias=True,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").double().eval()
    with torch.no_grad():
        for layer, own in zip(model.model.layers, strengths):
            attention = layer.self_attn
            for projection in (attention.q_proj, attention.k_proj):
                projection.weight.zero_()
                projection.bias.zero_()
            attention.k_proj.bias[::2] = 1
            attention.q_proj.bias[::2] = torch.tensor(own, dtype=torch.float64) * 2**0.5
    return model


def cosine_weights(strengths: Any, length: int) -> torch.Tensor:
    """The weights of `cosine_model`: `[layers, heads, length, length]`."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    scores = torch.tensor(strengths, dtype=torch.float64)[..., None, None] * distance.cos()
    return scores.masked_fill(distance < 0, -torch.inf).softmax(dim=-1)


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (rows, length), generator=generator)


def profile_of(weights: torch.Tensor, *, prefix_max: int = 4, **more: Any) -> Profile:
    """The profile of attention weights `[L, H, N, N]` of one row, by its definition."""
    layers, heads, length, _ = weights.shape
    edges = distance_edges(length)
    count = min(prefix_max, length)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    late = torch.arange(length) >= count
    shares = torch.zeros(layers, heads, len(edges) - 1, dtype=torch.float64)
    first = torch.zeros(layers, heads, count, len(edges) - 1, dtype=torch.float64)
    for k, (near, far) in enumerate(zip(edges, edges[1:])):
        inside = (distance >= near) & (distance < far)
        shares[..., k] = (weights * (inside & late)).sum((-1, -2)) / length
        first[..., k] = (weights * inside)[..., :count].sum(-2) / length
    values: dict[str, Any] = {
        "model": ModelIdentity("made by hand", layers, heads, max(1, heads // 2), VOCABULARY),
        "length": length,
        "rows": 1,
        "tokens": length,
        "digest": "0" * 16,
        "first": first.sum(-1),
        "distance": shares,
        "first_distance": first,
        "first_logits": torch.zeros(layers, heads, count, dtype=torch.float64),
    }
    return Profile(**(values | more))


def random_weights(layers: int, heads: int, length: int, seed: int, sharp: float) -> torch.Tensor:
    """Random causal attention: heads that prefer near, far, first or any tokens."""
    generator = torch.Generator().manual_seed(seed)
    distance = (torch.arange(length)[:, None] - torch.arange(length)).clamp(min=0).double()

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    slope = draw(layers, heads, 1, 1) * sharp
    scores = -slope * (distance + 1).log() + draw(layers, heads, 1, length).abs() * sharp
    scores = scores + draw(layers, heads, length, length)
    scores[..., 0] += draw(layers, heads, 1) * sharp * 2
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(dim=-1)
