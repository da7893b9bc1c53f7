"""Baselines on the GPU: compiled masks against the dense mask, and Reformer against the CPU."""

from __future__ import annotations

import pytest
import torch

from spattention.baselines import Baseline, BigBird, Longformer, PublishedMask, Reformer

HEADS, SPAN, LAYERS, WIDTH = 8, 1024, 4, 64
MASKED: dict[str, Baseline] = {
    "longformer": Longformer(HEADS, SPAN),
    "bigbird": BigBird(HEADS, SPAN),
    "published_longformer": PublishedMask(HEADS, SPAN, mask="longformer"),
    "published_bigbird": PublishedMask(HEADS, SPAN, mask="bigbird"),
    "published_reformer": PublishedMask(HEADS, SPAN, mask="reformer"),
}


@pytest.fixture(autouse=True)
def _forget_compilations() -> None:
    torch._dynamo.reset()  # their number is limited, per process


def drawn(length: int, heads: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(length + heads)
    return torch.randn(2, heads, length, WIDTH, generator=generator, device="cuda").to(dtype)


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("length", [1024, 1000])
def test_compiled_masks_are_dense_masks(name: str, length: int) -> None:
    for index in range(LAYERS):  # more layers than one: they must not each compile anew
        layer = MASKED[name].layer(index, LAYERS)
        query, key, value = (drawn(length, heads, torch.bfloat16) for heads in (HEADS, 4, 4))
        inputs = [t.requires_grad_() for t in (query, key, value)]
        gradient = drawn(length, HEADS, torch.float32)
        found = layer.attend(*inputs, WIDTH**-0.5)
        found_gradients = torch.autograd.grad(found, inputs, gradient.to(found.dtype))
        exact = [t.detach().double().requires_grad_() for t in inputs]
        mask = layer.dense(length, length, query.device)  # type: ignore[attr-defined]
        wanted = torch.nn.functional.scaled_dot_product_attention(
            *exact, attn_mask=mask, scale=WIDTH**-0.5, enable_gqa=True
        )
        wanted_gradients = torch.autograd.grad(wanted, exact, gradient.double())
        pairs = zip((found, *found_gradients), (wanted, *wanted_gradients))
        for mine, other in pairs:
            # A few roundings to bfloat16 of numbers up to the largest.
            allowed = 4 * torch.finfo(torch.bfloat16).eps * other.abs().max().item()
            torch.testing.assert_close(mine.double(), other, rtol=0.0, atol=allowed)


def test_reformer_is_the_same_on_the_gpu() -> None:
    layer = Reformer(HEADS, SPAN).layer(1, LAYERS)
    shared = drawn(1000, HEADS, torch.float32)
    value = shared.flip(2)
    buckets = layer.hash(shared)
    # Rounding moves the few vectors that lie between two buckets.
    assert (buckets.cpu() == layer.hash(shared.cpu())).double().mean() > 0.999
    layer.hash = lambda _: buckets.to(_.device)  # type: ignore[method-assign]
    found = layer.attend(shared, shared, value, WIDTH**-0.5)
    wanted = layer.attend(*(t.cpu().double() for t in (shared, shared, value)), WIDTH**-0.5)
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=0.0, atol=1e-4)
