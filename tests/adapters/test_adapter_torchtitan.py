"""Bands in models that torchtitan builds."""

from __future__ import annotations

import pytest
import torch

import spattention as spa

pytest.importorskip("torchtitan")
from torchtitan.models.common.attention import VarlenAttention, create_varlen_metadata_for_document
from torchtitan.models.llama3 import model_registry

from spattention.adapters import torchtitan

HEADS = 16  # of torchtitan's debug model
PATTERN = spa.BandPattern.shared_local(HEADS, 32, local=3)
LENGTHS = [[7, 15, 2], [20, 4]]  # documents of two rows of 24 tokens


def config(pattern=None):
    found = model_registry("debugmodel", attn_backend="varlen").model
    del found.layers[2:]
    return found if pattern is None else torchtitan.apply(found, pattern)


def build(pattern):
    torch.manual_seed(0)
    model = config(pattern).build()
    model.init_states()
    return model


def tokens():
    return torch.randint(2048, (2, 24), generator=torch.Generator().manual_seed(1))


def positions():
    return torch.tensor([[p for n in lengths for p in range(n)] for lengths in LENGTHS])


class DenseAttention(torchtitan.Module):
    """PyTorch's attention in the same place."""

    class Config(torchtitan.BandAttention.Config):
        __slots__ = ()

    def __init__(self, config):
        super().__init__()

    def forward(self, q, k, v, *, attention_masks, scale, enable_gqa):
        out = torch.nn.functional.scaled_dot_product_attention(
            *(each.transpose(1, 2) for each in (q, k, v)), is_causal=True, enable_gqa=enable_gqa
        )
        return out.transpose(1, 2)


def test_dense_bands_are_dense_attention():
    banded = build(spa.BandPattern.dense(HEADS, 32))
    found = config(PATTERN)
    for layer in found.layers:
        layer.attention.inner_attention = DenseAttention.Config(pattern=PATTERN)
    torch.manual_seed(0)
    dense = found.build()
    dense.init_states()
    torch.testing.assert_close(banded(tokens()), dense(tokens()), rtol=1e-4, atol=1e-5)


def test_a_token_reaches_what_the_bands_reach():
    """An edit of one token changes later outputs and no earlier one, and not those out of reach."""
    pattern = spa.BandPattern.sliding_window(HEADS, 32, 3)
    model, ids = build([pattern, pattern]), tokens()
    before = model(ids)
    ids[:, 5] = (ids[:, 5] + 1) % 2048
    changed = (model(ids) != before).any(-1)
    assert changed[:, 5:10].all()  # two layers that look back two tokens
    assert not changed[:, :5].any()
    assert not changed[:, 10:].any()


def test_documents_are_apart():
    """The trainer's own way: positions that restart, and the masks that the model makes of them."""
    model, ids = build(PATTERN), tokens()
    masks = model.get_attention_masks(positions())
    packed = model(ids, positions(), masks)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            alone = model(ids[row : row + 1, start : start + length])
            found = packed[row : row + 1, start : start + length]
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
            start += length


def test_training_lowers_the_loss():
    model, ids = build(PATTERN), tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    masks = model.get_attention_masks(positions())
    losses = []
    for _ in range(6):
        logits = model(ids, positions(), masks)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_an_epilogue_gets_the_log_sum_exp():
    """Models with learned sinks rescale the output by it."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 24, HEADS, 8) for _ in range(3))
    inner = torchtitan.BandAttention.Config(pattern=PATTERN).build()
    masks = create_varlen_metadata_for_document(positions())
    seen = {}

    def epilogue(out, lse):
        seen["lse"] = lse
        return 2 * out

    out = inner(q, k, v, attention_masks=masks, out_transform=epilogue)
    torch.testing.assert_close(out, 2 * inner(q, k, v, attention_masks=masks))
    row = slice(7, 22)  # the second document of the first row
    _, lse = spa.band_attention(
        *(each[:1, row].transpose(1, 2) for each in (q, k, v)), PATTERN, return_lse=True
    )
    torch.testing.assert_close(seen["lse"][:1, row], lse.transpose(1, 2))
    with pytest.raises(ValueError, match="must be VarlenMetadata or None, got dict"):
        inner(q, k, v, attention_masks={})


@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        (spa.BandPattern.dense(8, 32), "`pattern` has 8 heads but layer 0 of `model` has 16"),
        ([PATTERN], "`pattern` has 1 entries but `model` has 2"),
    ],
    ids=["heads", "entries"],
)
def test_refusals_leave_the_config(pattern, match):
    found = config()
    before = found.to_dict()
    with pytest.raises(ValueError, match=match):
        torchtitan.apply(found, pattern)
    assert found.to_dict() == before


def test_windows_and_other_attention_are_refused():
    found = config()
    found.layers[1].attention.inner_attention = VarlenAttention.Config(window_size=(7, 0))
    with pytest.raises(ValueError, match=r"layer 1 must have no sliding window, got \(7, 0\)"):
        torchtitan.apply(found, PATTERN)
    from torchtitan.models.common.attention import ScaledDotProductAttention

    found.layers[1].attention.inner_attention = ScaledDotProductAttention.Config()
    with pytest.raises(ValueError, match="layer 1 must be FlexAttention or VarlenAttention"):
        torchtitan.apply(found, PATTERN)


def test_the_config_of_a_run_names_the_bands():
    inner = config(PATTERN).to_dict()["layers"][0]["attention"]["inner_attention"]
    assert spa.BandPattern.from_dict(inner["pattern"]) == PATTERN
