"""Every supported family, tiny and in float64: right logits and gradients, and tokens that mix."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import (
    EAGER,
    EXACT,
    FAMILIES,
    FIRST,
    HEADS,
    SECOND,
    STOCK,
    VOCABULARY,
    Calls,
    Masked,
    banded,
    build,
    logits,
    tokens,
)

import spattention as spa

PATTERNS = (FIRST, SECOND)
close = torch.testing.assert_close


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_attention_under_the_mask_agrees(family, monkeypatch):
    """Logits and gradients are those of stock attention under the mask."""
    stock = Masked(build(family, "sdpa"), PATTERNS)
    model = banded(family)
    calls = Calls(monkeypatch)
    ids = tokens(2, 19)

    expected, actual = stock(ids, labels=ids), model(ids, labels=ids)

    assert calls.patterns == [FIRST, SECOND]
    close(actual.logits, expected.logits, **EXACT)
    close(actual.logits, Masked(build(family, "eager"), PATTERNS)(ids).logits, **EAGER)
    assert (actual.logits - logits(build(family), ids)).abs().max() > 1e-3  # dense differs
    expected.loss.backward()
    actual.loss.backward()
    wanted = dict(stock.model.named_parameters())
    for name, parameter in model.named_parameters():
        close(parameter.grad, wanted[name].grad, **EXACT)


@pytest.mark.parametrize(
    ("family", "reentrant"), [*((family, False) for family in FAMILIES), ("llama", True)]
)
def test_gradient_checkpointing_same_gradients(family, reentrant):
    """Gradient checkpointing gives the same gradients."""
    plain, saving = banded(family, sinks=True), banded(family, sinks=True)
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        saving.enable_input_require_grads()
    ids = tokens(2, 13)
    for model in (plain, saving):
        model.train()
        model(ids, labels=ids, use_cache=False).loss.backward()
    wanted = dict(plain.named_parameters())
    for name, parameter in saving.named_parameters():
        close(parameter.grad, wanted[name].grad, **EXACT)
    assert any(p.grad.abs().max() > 0 for n, p in saving.named_parameters() if n.endswith("sinks"))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_changes_what_bands_reach(family):
    """The published code mixed heads within a token instead of tokens, and no test of shapes could
    see it.
    """
    length, edited = 23, 6
    sparse = spa.BandPattern(intervals=(((0, 1),), ((3, 4),), ((0, 1), (5, 6)), ()), span=24)
    model = banded(family, (sparse, sparse))
    ids = tokens(1, length)
    other = ids.clone()
    other[0, edited] = (ids[0, edited] - 1) % VOCABULARY
    changed = (logits(model, ids) - logits(model, other)).abs().amax(dim=(0, 2)) > 0

    step = sparse.mask(length).any(dim=0) | torch.eye(length, dtype=torch.bool)
    reach = (step.int() @ step.int()) > 0
    assert changed.tolist() == reach[:, edited].tolist()
    assert not changed[:edited].any()
    assert changed[edited + 1 :].any()
    assert not changed[edited + 1 :].all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_nothing_for_valid_tokens(family, side):
    model = banded(family, sinks=True)
    ids = tokens(2, 11)
    before = {"left": 5, "right": 0, "both": 2}[side]
    after = {"left": 0, "right": 5, "both": 3}[side]
    padded = torch.nn.functional.pad(ids[1:], (before, after))
    rows = torch.cat([tokens(1, 16, seed=5), padded])
    mask = torch.ones_like(rows)
    mask[1, :before] = 0
    mask[1, 11 + before :] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)

    found = logits(model, rows, attention_mask=mask, position_ids=positions)

    close(found[1:, before : before + 11], logits(model, ids[1:]), **EXACT)
    close(found[:1], logits(model, rows[:1]), **EXACT)
    assert found.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_has_finite_gradients(family):
    model = banded(family).train()
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_layer_may_keep_its_own_attention(family, monkeypatch):
    for own, tolerance in STOCK.items():
        stock = Masked(build(family, own), (None, SECOND))
        model = spa.hf.apply(build(family, own), (None, SECOND))
        calls = Calls(monkeypatch)
        ids = tokens(2, 17)
        close(logits(model, ids), stock(ids).logits, **tolerance)
        assert calls.patterns == [SECOND]


def test_a_layer_left_alone_is_as_before():
    """A layer left alone sees padding packing and the cache as before."""
    model = spa.hf.apply(build("llama"), (None, spa.BandPattern.dense(HEADS, 64)))
    stock = build("llama")
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    valid = mask.bool()
    padded = logits(model, ids, attention_mask=mask)
    close(padded[valid], logits(stock, ids, attention_mask=mask)[valid], **EXACT)

    positions = torch.tensor([[*range(7), *range(5)]]).expand(2, -1)
    wanted = logits(stock, ids, position_ids=positions, use_cache=False)
    close(logits(model, ids, position_ids=positions, use_cache=False), wanted, **EXACT)
    close(logits(model, ids, position_ids=positions), wanted, **EXACT)
    offsets = torch.tensor([0, 7, 12], dtype=torch.int32)
    flat = {
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": 7,
        "max_length_k": 7,
    }
    found = logits(model, ids[:1], position_ids=positions[:1], use_cache=False, **flat)
    close(found, wanted[:1], **EXACT)
    # Without `position_ids`, or with a cache, documents are known from their offsets alone.
    straight = torch.arange(12)[None]
    apart = [
        logits(stock, ids[:1, start:stop], position_ids=straight[:, start:stop])
        for start, stop in ((0, 7), (7, 12))
    ]
    for use_cache in (False, True):
        found = logits(model, ids[:1], use_cache=use_cache, **flat)
        close(found, torch.cat(apart, dim=1), **EXACT)

    first = model(ids[:, :5])
    second = model(ids[:, 5:], past_key_values=first.past_key_values)
    close(torch.cat([first.logits, second.logits], dim=1), logits(stock, ids), **EXACT)


def test_replaced_patterns_keep_sinks():
    """Patterns can be replaced and sinks keep their values."""
    model = banded("llama", sinks=True)
    with torch.no_grad():
        model.model.layers[0].self_attn.sinks.fill_(0.5)
    spa.hf.apply(model, FIRST, sinks=True)
    assert model.model.layers[0].self_attn.sinks.tolist() == [0.5] * HEADS
    spa.hf.apply(model, FIRST)
    assert not any("sinks" in name for name, _ in model.named_parameters())
    close(logits(model, tokens(1, 9)), logits(banded("llama", FIRST), tokens(1, 9)), **EXACT)
    for module in model.modules():
        hooks = list(module._forward_pre_hooks.values())
        assert len(hooks) == len(set(hooks))


def test_sinks_join_the_denominator():
    model = banded("llama", sinks=True)
    ids = tokens(1, 9)
    zero = logits(model, ids)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(-1e4)
    close(logits(model, ids), logits(banded("llama"), ids), **EXACT)
    assert (zero - logits(banded("llama"), ids)).abs().max() > 1e-3


def test_a_copy_runs_its_own_pattern():
    model = banded("llama")
    twin = copy.deepcopy(model)
    spa.hf.apply(model, SECOND)
    ids = tokens(1, 9)
    close(logits(twin, ids), logits(banded("llama"), ids), **EXACT)


def test_half_precision_and_autocast_run():
    model = banded("olmoe", sinks=True).float()
    ids = tokens(1, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(model, ids).isfinite().all()
    assert logits(model.bfloat16(), ids).isfinite().all()
    with torch.autocast("cpu", torch.float16):  # sinks in neither the queries' dtype nor float32
        assert logits(model, ids).isfinite().all()
