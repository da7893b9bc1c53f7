"""Bands in models that OLMo-core builds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import spattention as spa

pytest.importorskip("olmo_core")
from olmo_core.nn.transformer import TransformerBlockType, TransformerConfig

from spattention.adapters import olmo_core

PATTERN = spa.BandPattern.shared_local(4, 32, local=3)
LENGTHS = [[7, 15, 2], [20, 4, 0]]  # documents of two rows of 24 tokens


# As `TransformerConfig.olmo2_190M` and its family differ from Llama.
OLMO: dict[str, Any] = {"block_name": TransformerBlockType.reordered_norm, "qk_norm": True}


def build(**options):
    torch.manual_seed(0)
    config = TransformerConfig.llama_like(
        d_model=64, vocab_size=97, n_layers=2, n_heads=4, n_kv_heads=2, **options
    )
    model = config.build(init_device="cpu")
    model.init_weights()
    return model


def tokens():
    return torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))


def test_dense_bands_are_olmo_cores_own_attention():
    model, ids = build(), tokens()
    before = model(ids)
    olmo_core.apply(model, spa.BandPattern.dense(4, 32))
    torch.testing.assert_close(model(ids), before, rtol=1e-4, atol=1e-5)


def test_a_token_reaches_what_the_bands_reach():
    """An edit of one token changes later outputs and no earlier one, and not those out of reach."""
    model, ids = build(), tokens()
    pattern = spa.BandPattern.sliding_window(4, 32, 3)
    olmo_core.apply(model, [pattern, pattern])
    before = model(ids)
    ids[:, 5] = (ids[:, 5] + 1) % 97
    changed = (model(ids) != before).any(-1)
    assert changed[:, 5:10].all()  # two layers that look back two tokens
    assert not changed[:, :5].any()
    assert not changed[:, 10:].any()


@pytest.mark.parametrize("options", [{}, OLMO], ids=["llama", "olmo"])
def test_documents_are_apart(options):
    model = olmo_core.apply(build(**options), PATTERN)
    ids = tokens()
    packed = model(
        ids,
        doc_lens=torch.tensor(LENGTHS),
        max_doc_lens=[max(lengths) for lengths in LENGTHS],
    )
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in filter(None, lengths):
            alone = model(ids[row : row + 1, start : start + length])
            torch.testing.assert_close(
                packed[row : row + 1, start : start + length], alone, rtol=1e-4, atol=1e-5
            )
            start += length


def test_training_lowers_the_loss():
    model, ids = build(), tokens()
    olmo_core.apply(model, PATTERN)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(
            model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_weights_keep_their_names():
    model = build()
    names = list(model.state_dict())
    assert list(olmo_core.apply(model, PATTERN).state_dict()) == names


@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        (spa.BandPattern.dense(8, 32), "`pattern` has 8 heads but layer 0 of `model` has 4"),
        ([PATTERN], "`pattern` has 1 entries but `model` has 2"),
        ([PATTERN, None], "`pattern` of layer 1 must be a BandPattern, got None"),
    ],
    ids=["heads", "entries", "none"],
)
def test_refusals_leave_the_model(pattern, match):
    model, ids = build(), tokens()
    before = model(ids)
    with pytest.raises(ValueError, match=match):
        olmo_core.apply(model, pattern)
    assert torch.equal(model(ids), before)


def test_windows_and_dropout_are_refused():
    model = build()
    model.blocks["1"].attention.backend.window_size = (7, 0)
    with pytest.raises(ValueError, match=r"layer 1 must have no sliding window, got \(7, 0\)"):
        olmo_core.apply(model, PATTERN)
    model.blocks["1"].attention.backend.window_size = (-1, -1)
    model.blocks["0"].attention.backend.dropout_p = 0.1
    with pytest.raises(ValueError, match=r"dropout of layer 0 must be 0, got 0\.1"):
        olmo_core.apply(model, PATTERN)
    with pytest.raises(ValueError, match="must have attention layers"):
        olmo_core.apply(torch.nn.Linear(2, 2), PATTERN)


@pytest.mark.parametrize("what", ["ring_cp", "ulysses_cp", "kv_cache", "packed_qkv", "swa"])
def test_what_bands_lack_is_refused(what):
    with pytest.raises(RuntimeError, match="BandBackend"):
        getattr(olmo_core.BandBackend, f"assert_supports_{what}")()
