"""RRAttention against its estimate written out, and what its choice of blocks must hold."""

from __future__ import annotations

import pytest
import torch
from relatives import EXCLUSIVE, HEADS, SPAN, build, inputs, logits, tokens

from spattention import BandPattern, related
from spattention.bands import in_bands
from spattention.related import RRAttention

close = torch.testing.assert_close
EXACT = {"rtol": 0.0, "atol": 1e-10}
SPLIT = BandPattern((((0, 5), (9, 22)), ((3, 4),), (), ((17, 48),)), SPAN)
PATTERNS = [None, EXCLUSIVE, SPLIT]
each_pattern = pytest.mark.parametrize("bands", PATTERNS, ids=["dense", "exclusive", "split"])


def method(bands=None, **values):
    return RRAttention(HEADS, SPAN, bands, **{"block": 8, "stride": 4, "tau": 0.6, **values})


def layer(bands=None, **values):
    return method(bands, **values).layer(0, 1)


def mask_of(bands, length):
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return in_bands(distance, (bands or BandPattern.dense(HEADS, SPAN)).intervals)


def reference(query, key, bands, block, stride, scale):
    """The mass of blocks, sampled query by sampled query, in float64."""
    batch, heads, length, _ = query.shape
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    blocks, mask = -(-length // block), mask_of(bands, length)
    mass = query.new_zeros(batch, heads, blocks, blocks)
    for b in range(batch):
        for h in range(heads):
            for i in range(h % stride, length, stride):
                sums = {}
                for j in range(length):
                    if mask[h, i, j]:
                        sums[j // stride] = sums.get(j // stride, 0) + key[b, h, j]
                if not sums:
                    continue
                scores = torch.stack([query[b, h, i] @ s * scale / stride for s in sums.values()])
                for c, share in zip(sums, scores.softmax(dim=0)):
                    mass[b, h, i // block, c * stride // block] += share
    return mass


@each_pattern
@pytest.mark.parametrize(
    ("block", "stride", "length"), [(8, 4, 48), (8, 8, 37), (4, 2, 3), (6, 3, 29)]
)
def test_the_mass_of_blocks_is_its_equations(bands, block, stride, length):
    query, key, _ = inputs(length)
    found = layer(bands, block=block, stride=stride).estimate(query, key, 0.35)
    close(found, reference(query, key, bands, block, stride, 0.35), **EXACT)


def test_the_mass_is_the_same_in_pieces(monkeypatch):
    query, key, _ = inputs(SPAN)
    whole = layer(SPLIT).estimate(query, key, 0.35)
    monkeypatch.setattr("spattention.related.rrattention.SCORES", 1)
    close(layer(SPLIT).estimate(query, key, 0.35), whole, **EXACT)


@each_pattern
def test_strides_of_one_token_measure_attention_itself(bands):
    query, key, _ = inputs(SPAN)
    one = layer(bands, stride=1, tau=1)
    weights = one.weights(query, key, 0.35, 0, SPAN).double()
    wanted = weights.unflatten(2, (-1, 8)).unflatten(4, (-1, 8)).sum(dim=(3, 5))
    close(one.estimate(query, key, 0.35), wanted, rtol=0.0, atol=1e-5)


def test_rows_of_mass_add_up_to_the_sampled_queries():
    query, key, _ = inputs(SPAN)
    close(layer().estimate(query, key, 0.35).sum(dim=-1), torch.full((2, HEADS, 6), 2.0).double())


@each_pattern
def test_a_layer_attends_the_kept_blocks(bands):
    """And what it keeps is the fewest blocks that hold tau, counted after the forced ones."""
    query, key, value = inputs(45)
    chosen = layer(bands)
    kept, mass = chosen.select(query, key, 0.35), chosen.estimate(query, key, 0.35)
    mask = mask_of(bands, 45)
    there = torch.nn.functional.pad(mask, (0, 3, 0, 3)).unflatten(1, (6, 8)).unflatten(3, (6, 8))
    assert not (kept & ~there.any(dim=4).any(dim=2)).any()
    wide = kept.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)[:, :, :45, :45]
    scores = query @ key.repeat_interleave(2, dim=1).mT * 0.35
    weights = scores.masked_fill(~(wide & mask), -torch.inf).softmax(dim=-1).nan_to_num(0.0)
    wanted = weights @ value.repeat_interleave(2, dim=1)
    close(chosen.attend(query, key, value, 0.35), wanted, **EXACT)
    held = (mass * kept).sum(dim=-1)
    assert (held >= 0.6 * mass.sum(dim=-1) - 1e-9).all()
    free = kept & ~layer(bands, tau=1e-9).select(query, key, 0.35)
    least = mass.masked_fill(~free, torch.inf).amin(dim=-1)
    few = held - least < 0.6 * mass.sum(dim=-1) + 1e-9
    assert (few | ~free.any(dim=-1)).all()
    assert free.any() or bands is not None  # narrow bands hold no whole block


@each_pattern
def test_flex_attention_attends_the_same_blocks(bands):
    query, key, value = inputs(48)
    chosen = layer(bands)
    kept = chosen.select(query, key, 0.35)
    found = chosen.attend_blocks(query, key, value, 0.35, kept)
    close(found, chosen.attend(query, key, value, 0.35), **EXACT)


def test_sink_diagonal_and_last_row_are_kept():
    query, key, _ = inputs(SPAN)
    kept = layer(tau=1e-9).select(query, key, 0.35)[0, 0]
    assert kept.diagonal().all()
    assert kept[:, 0].all()
    assert torch.equal(kept[-1], torch.ones(6, dtype=torch.bool))
    assert kept.sum() == 5 + 5 + 5
    bare = layer(tau=1e-9, sink=0, last=0).select(query, key, 0.35)[0, 0]
    assert bare.diagonal().all()
    assert bare.sum() == 6


def test_blocks_that_an_edge_of_a_band_cuts_are_kept():
    query, key, _ = inputs(SPAN)
    kept = layer(EXCLUSIVE, tau=1e-9, sink=0, last=0).select(query, key, 0.35)
    mask = mask_of(EXCLUSIVE, SPAN).unflatten(1, (6, 8)).unflatten(3, (6, 8))
    cut = mask.any(dim=4).any(dim=2) & ~mask.all(dim=4).all(dim=2)
    assert torch.equal(kept[0], cut)


@pytest.mark.parametrize("bands", [None, EXCLUSIVE])
def test_tau_of_one_keeps_everything(bands):
    model, ids = build("llama"), tokens(2, SPAN)
    if bands is None:
        wanted = logits(model, ids)
    else:
        from spattention import hf

        wanted = logits(hf.apply(build("llama"), bands), ids)
    close(logits(related.apply(model, method(bands, tau=1)), ids), wanted, **EXACT)


def test_underflowing_scores_keep_blocks_at_tau_one():
    query, key, value = inputs(SPAN)
    key[:, :, 20:] += 1e4
    found = layer(tau=1).attend(query, key, value, 0.35)
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.35, enable_gqa=True
    )
    close(found, dense, **EXACT)


def test_heads_a_stride_apart_sample_the_same_queries():
    wide = RRAttention(8, SPAN, block=8, stride=4)
    query, key, _ = inputs(SPAN)
    query = query[:, :1].repeat(1, 8, 1, 1)
    mass = wide.layer(0, 1).estimate(query, key[:, :1], 0.35)
    close(mass[:, :4], mass[:, 4:], **EXACT)
    assert not torch.allclose(mass[:, 0], mass[:, 1])


def test_order_within_a_stride_does_not_matter():
    query, key, _ = inputs(SPAN)
    swapped = key.clone()
    swapped[:, :, 4:8] = key[:, :, [7, 5, 4, 6]]
    before, after = (layer().select(query, k, 0.35) for k in (key, swapped))
    assert torch.equal(before[:, :, 2:], after[:, :, 2:])


def test_half_precision_does_not_overflow():
    """The sum of a stride's keys exceeds what float16 holds."""
    query, key, _ = (t.half() for t in inputs(SPAN))
    mass = layer().estimate(query, key.abs() * 2e4, 1e-5)
    assert torch.isfinite(mass).all()
    assert mass.dtype == torch.float32


def test_an_edit_reaches_no_earlier_block():
    """One choice serves the queries of a block: it is causal from block to block, and not within
    one.
    """
    model, ids = related.apply(build("llama"), method(tau=0.3)), tokens(1, SPAN)
    before, leaks = logits(model, ids), 0
    for t in range(SPAN):
        edited = ids.clone()
        edited[0, t] = 2 + (ids[0, t] - 1) % 50
        changed = (logits(model, edited) != before).any(dim=-1)[0]
        assert not changed[: t // 8 * 8].any()
        leaks += int(changed[:t].sum())
    assert leaks > 0


def test_chunks_after_the_first_attend_all_of_the_past():
    """The authors' function for chunks would put the diagonal at the start."""
    query, key, value = inputs(SPAN)
    found = layer().attend(query[:, :, 40:], key, value, 0.35)
    wanted = layer(tau=1).attend(query, key, value, 0.35)
    close(found, wanted[:, :, 40:], **EXACT)


def test_the_captured_share_is_that_of_the_kept_blocks():
    query, key, _ = inputs(SPAN)
    for tau, least in ((0.3, 0.2), (0.99, 0.9)):
        share = layer(tau=tau).captured(query, key, 0.35, 8, SPAN)
        assert (share <= 1 + 1e-6).all()
        assert share.mean() > least


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"stride": 3}, "`stride` of `rrattention` must divide `block` = 8, got 3"),
        ({"tau": 0}, "must be above 0 and at most 1, got 0"),
        ({"tau": float("nan")}, "must be above 0 and at most 1, got nan"),
        ({"tau": "0.5"}, "`tau` of `rrattention` must be a number, got '0.5'"),
        ({"sink": 2}, "`sink` of `rrattention` must be an integer from 0 to 1, got 2"),
    ],
)
def test_wrong_values_raise(values, error):
    with pytest.raises(ValueError, match=error):
        method(**values)
