"""Padding anywhere in a row, on a GPU: the logits of each row alone, without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import spattention as spa

DEVICE = "cuda"
LENGTH = 150
PATTERN = spa.BandPattern.shared_local(4, 128)


def banded() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=256,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        pad_token_id=0,
    )
    model = spa.hf.apply(LlamaForCausalLM(config), PATTERN, sinks=True)
    return model.to(DEVICE).eval()


def text() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, mask and positions of a row without padding and of rows with it in any place."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 61, (3, LENGTH), generator=generator)
    mask = (torch.rand(3, LENGTH, generator=generator) > 0.2).long()
    mask[0], mask[1, :40], mask[2, 70:90] = 1, 0, 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return ids.to(DEVICE), mask.to(DEVICE), positions.to(DEVICE)


def make_cache(kind: str, model: Any) -> Any:
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=LENGTH + 20)
    return (
        DynamicCache(config=model.config) if kind == "dynamic" else spa.hf.BandCache(model.config)
    )


def rows_alone(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    rows = [row[real.bool()][None] for row, real in zip(ids, mask)]
    with torch.no_grad():
        return torch.cat([model(row, use_cache=False).logits[0] for row in rows])


@pytest.mark.parametrize("kind", ["none", "dynamic", "static", "band"])
def test_logits_are_those_of_each_row_alone(kind: str) -> None:
    model = banded()
    ids, mask, positions = text()
    cache = None if kind == "none" else make_cache(kind, model)
    pieces = [LENGTH] if cache is None else [100, 1, 1, 9, 1, 30, *[1] * 8]
    found, end = [], 0
    for piece in ids.split(pieces, dim=1):
        start, end = end, end + piece.shape[1]
        some = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
        with torch.no_grad():
            out = model(piece, past_key_values=cache, use_cache=cache is not None, **some)
        found.append(out.logits)
    real = mask.bool()
    wanted = rows_alone(model, ids, mask)
    torch.testing.assert_close(torch.cat(found, dim=1)[real], wanted, rtol=0.0, atol=1e-3)


def test_training_on_padding_in_one_graph() -> None:
    """Values of the mask are not read there; gradients are those of the eager model."""
    model, twin = banded(), banded()
    ids, mask, positions = text()
    compiled = torch.compile(twin, fullgraph=True)
    for net in (model, compiled):
        out = net(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        out[mask.bool()].square().mean().backward()
    for expected, found in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "static", "band"])
def test_a_second_turn_of_a_batch(kind: str) -> None:
    """`generate` compiles the steps of a static cache and of a BandCache by itself."""
    model = banded()
    ids, mask, _ = text()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask[:, -1] = 1
    found = model.generate(
        ids, attention_mask=mask, past_key_values=make_cache(kind, model), **options
    )
    for row, real in enumerate(mask.bool()):
        alone = ids[row][real][None]
        wanted = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
        assert found[row, -8:].tolist() == wanted[0, -8:].tolist()
