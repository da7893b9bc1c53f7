"""Element-wise attention against its sums written out, and its limits."""

from __future__ import annotations

import math

import pytest
import torch
from relatives import EXCLUSIVE, HEADS, SPAN, build, inputs, logits, tokens

from spattention import BandPattern, related
from spattention.bands import in_bands
from spattention.baselines.state import State
from spattention.related import Elementwise

close = torch.testing.assert_close
EXACT = {"rtol": 0.0, "atol": 1e-9}
SPLIT = BandPattern((((0, 5), (9, 22)), ((3, 4),), (), ((17, 48),)), SPAN)
PATTERNS = [None, EXCLUSIVE, SPLIT]
each_pattern = pytest.mark.parametrize("bands", PATTERNS, ids=["dense", "exclusive", "split"])


def layer(bands=None, **values):
    return Elementwise(HEADS, SPAN, bands, **values).layer(0, 1)


def reference(query, key, value, bands, order, scale=0.5, bound=4.0):
    """Sums over all pairs, channel by channel; `order` None for the exponential itself."""
    key, value = (t.repeat_interleave(2, dim=1) for t in (key, value))
    q, k = (bound * torch.tanh(t / bound) for t in (query, key))
    q, k = q[..., :, None, :], k[..., None, :, :]  # [B, H, Q, K, D]
    if order is None:
        similar = torch.exp(-scale * (q - k) ** 2)
    else:
        cross = sum((2 * scale * q * k) ** n / math.factorial(n) for n in range(order + 1))
        similar = torch.exp(-scale * k**2) * cross
    length = query.shape[2]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    mask = in_bands(distance, (bands or BandPattern.dense(HEADS, SPAN)).intervals)
    similar = similar * mask[..., None]
    total = similar.sum(dim=3)
    return (similar * value[:, :, None]).sum(dim=3) / torch.where(total == 0, 1.0, total)


@each_pattern
@pytest.mark.parametrize("order", [0, 2, 6])
def test_a_layer_is_its_equations(bands, order):
    given = inputs(37)
    close(layer(bands, order=order).attend(*given, 9.9), reference(*given, bands, order), **EXACT)


def test_scale_and_bound_are_those_of_the_equations():
    given = inputs(37)
    found = layer(order=4, scale=1.5, bound=2.0).attend(*given, 9.9)
    close(found, reference(*given, None, 4, 1.5, 2.0), **EXACT)


@each_pattern
def test_high_orders_are_the_exponential(bands):
    given = inputs(SPAN)
    wanted, errors = reference(*given, bands, None), []
    for order in (2, 6, 20, 64):
        errors.append((layer(bands, order=order).attend(*given, 1.0) - wanted).norm().item())
    assert all(after < before for before, after in zip(errors, errors[1:]))
    assert errors[-1] < 1e-6


@each_pattern
def test_gradients_are_those_of_the_equations(bands):
    given = [t.requires_grad_() for t in inputs(21)]
    weight = inputs(21, seed=1)[0]
    found = torch.autograd.grad((layer(bands).attend(*given, 1.0) * weight).sum(), given)
    wanted = torch.autograd.grad((reference(*given, bands, 6) * weight).sum(), given)
    for mine, other in zip(found, wanted):
        close(mine, other, **EXACT)


@each_pattern
def test_the_recurrence_is_the_parallel_form(bands):
    given = inputs(SPAN)
    wanted = layer(bands).attend(*given, 1.0)
    for sizes in ([1] * SPAN, [5, 3, 1, 23, 16], [47, 1]):
        state, found = State(), []
        for part in zip(*(t.split(sizes, dim=2) for t in given)):
            found.append(layer(bands).attend_after(state, *part, 1.0))
            state.length += part[0].shape[2]
        close(torch.cat(found, dim=2), wanted, **EXACT)


def test_the_past_is_moments_alone():
    model, sizes = related.apply(build("llama"), Elementwise(HEADS, SPAN, order=2)), []
    for length in (5, 40):
        with torch.no_grad():
            cache = model(tokens(1, length), use_cache=True).past_key_values
        sizes.append([{n: list(t.shape) for n, t in x.state.tensors.items()} for x in cache.layers])
    assert sizes[0] == sizes[1] == [{"moments": [1, 6, HEADS, 1, 8]}] * 3


def test_equal_values_come_back():
    query, key, value = inputs(SPAN)
    value = torch.full_like(value, 1.7)
    close(layer().attend(query, key, value, 1.0), torch.full_like(query, 1.7), **EXACT)


def test_bands_that_share_out_distances_add_up():
    """The sums of `exclusive` heads over equal heads are those of all of the past."""
    _, _, value = inputs(SPAN)
    total = value[:, :1].cumsum(dim=2).expand(-1, HEADS, -1, -1)
    found = layer(EXCLUSIVE)._in_bands(total, SPAN).sum(dim=1)
    close(found, total[:, 0], **EXACT)


def test_weights_are_those_that_attend_uses():
    """The mean over channels of the output is that of the weights where values share a channel."""
    query, key, value = inputs(SPAN)
    value = value[..., :1].expand(-1, -1, -1, 8)
    for bands in PATTERNS:
        weights = layer(bands).weights(query, key, 1.0, 0, SPAN).double()
        wanted = layer(bands).attend(query, key, value, 1.0).mean(dim=-1)
        found = (weights @ value.repeat_interleave(2, dim=1))[..., 0]
        close(found, wanted, rtol=0.0, atol=1e-5)


def test_large_queries_and_keys_stay_finite():
    """Without the bound every weight of float32 would underflow."""
    query, key, value = (t.float() * 100 for t in inputs(SPAN))
    for bands in PATTERNS:
        found = layer(bands).attend(query, key, value, 1.0)
        assert torch.isfinite(found).all()
        wanted = reference(query.double(), key.double(), value.double(), bands, 6)
        close(found.double(), wanted, rtol=0.0, atol=1e-2)


def test_a_far_band_of_a_long_text_is_exact_in_float32():
    """Differences of float32 prefix sums would lose what they have in common."""
    bands = BandPattern((((0, 1),),), 20_000)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, 20_000, 1, generator=generator) for _ in range(3))
    found = Elementwise(1, 20_000, bands).layer(0, 1).attend(query, key, value, 1.0)
    close(found, value, rtol=0.0, atol=1e-5)  # a token sees itself alone


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"order": 3}, "`order` of `elementwise` must be even"),
        ({"order": -2}, "`order` of `elementwise` must be an integer from 0"),
        ({"scale": 0}, "`scale` of `elementwise` must be above 0"),
        ({"bound": "x"}, "`bound` of `elementwise` must be a number, got 'x'"),
        ({"bound": 12.0}, "must be at most 64, got 72"),
    ],
)
def test_wrong_values_raise(values, error):
    with pytest.raises(ValueError, match=error):
        Elementwise(HEADS, SPAN, **values)


def test_values_with_other_channels_are_refused():
    query, key, value = inputs(5)
    with pytest.raises(ValueError, match="must have the 8 channels of `key` for elementwise"):
        layer().attend(query, key, value[..., :4], 1.0)


def test_a_model_learns_through_it():
    model, ids = related.apply(build("llama"), Elementwise(HEADS, SPAN)).train(), tokens(2, 40)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.isfinite(logits(model, ids)).all()


def test_prefix_sums_stay_out_of_compiled_graphs():
    """PyTorch's compiler fails on some of them on a GPU, so that they run as they are."""
    seen = []

    def record(module, inputs):
        parts = [each for each in module.modules() if isinstance(each, torch.fx.GraphModule)]
        seen.extend(str(node.target) for each in parts for node in each.graph.nodes)
        return module.forward

    attention = layer(EXCLUSIVE, order=2)

    def block(query, key, value):
        return attention.attend(query * 2, key, value, 1.0) + 1

    given = [t.requires_grad_() for t in inputs(37)]
    found = torch.compile(block, backend=record)(*given)
    close(found, block(*given), **EXACT)
    found.sum().backward()
    assert any("mul" in name for name in seen)
    assert not any("cumsum" in name for name in seen)
