"""CCA against its equations, in the limits where it is dense, and over its cache."""

from __future__ import annotations

import pytest
import torch
import transformers
from relatives import HEADS, SPAN, build, inputs, logits, tokens
from torch.nn.functional import scaled_dot_product_attention

from spattention import BandPattern, related
from spattention.baselines import seen
from spattention.baselines.state import State
from spattention.related import CCA

close = torch.testing.assert_close
EXACT = {"rtol": 0.0, "atol": 1e-10}
# group, window, tokens: lengths that end within a group and at its end, and short ones
SIZES = [
    (4, 8, 41),
    (4, 8, 40),
    (3, 3, 29),
    (1, 5, 17),
    (4, 16, 48),
    (8, 8, 9),
    (4, 8, 7),
    (5, 10, 1),
]


def reference(query, key, value, group, window, bands=None, scale=0.35):
    """The equations, query by query and head by head, counted from 0."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    out = torch.empty_like(query)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            q, k, v, cores = query[b, h], key[b, h], value[b, h], []
            for j in range(len(q) // group):
                members = slice(j * group, (j + 1) * group)
                w = (q[(j + 1) * group - 1] @ k[members].T * scale).softmax(dim=0)
                cores.append((w @ k[members], w @ v[members]))
            for i in range(len(q)):
                count = max(0, (i + 1 - window) // group)
                far = [
                    j
                    for j in range(count)
                    if bands is None
                    or any(near <= count - 1 - j < end for near, end in bands.intervals[h])
                ]
                keys = [cores[j][0] for j in far] + list(k[group * count : i + 1])
                values = [cores[j][1] for j in far] + list(v[group * count : i + 1])
                weights = (torch.stack(keys) @ q[i] * scale).softmax(dim=0)
                out[b, h, i] = weights @ torch.stack(values)
    return out


def method(group, window, bands=None):
    return CCA(HEADS, SPAN, bands, group=group, window=window)


@pytest.mark.parametrize(("group", "window", "length"), SIZES)
def test_a_layer_is_its_equations(group, window, length):
    query, key, value = inputs(length)
    found = method(group, window).layer(0, 1).attend(query, key, value, 0.35)
    close(found, reference(query, key, value, group, window), **EXACT)


@pytest.mark.parametrize(
    "bands",
    [
        BandPattern.exclusive(HEADS, 10),
        BandPattern((((0, 2), (5, 7)), (), ((9, 10),), ((0, 10),)), 10),
    ],
    ids=["exclusive", "uneven"],
)
def test_far_heads_take_bands_of_core_tokens(bands):
    query, key, value = inputs(SPAN)
    found = method(4, 8, bands).layer(0, 1).attend(query, key, value, 0.35)
    close(found, reference(query, key, value, 4, 8, bands), **EXACT)


def test_gradients_are_those_of_the_equations():
    for bands in (None, BandPattern.exclusive(HEADS, 10)):
        given = [t.requires_grad_() for t in inputs(30)]
        weight = inputs(30, seed=1)[0]
        layer = method(4, 8, bands).layer(0, 1)
        found = torch.autograd.grad((layer.attend(*given, 0.35) * weight).sum(), given)
        exact = reference(*given, 4, 8, bands)
        for mine, wanted in zip(found, torch.autograd.grad((exact * weight).sum(), given)):
            close(mine, wanted, **EXACT)


@pytest.mark.parametrize(("group", "window"), [(1, 1), (1, 7), (16, 48), (24, 48), (4, 96)])
def test_groups_of_one_and_wide_windows_are_dense(group, window):
    query, key, value = inputs(SPAN)
    found = method(group, window).layer(0, 1).attend(query, key, value, 0.35)
    dense = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.35, enable_gqa=True
    )
    close(found, dense, **EXACT)


@pytest.mark.parametrize(("group", "window", "length"), SIZES)
def test_every_past_token_is_seen_exactly_once(group, window, length):
    """Under equal scores a token's weight is one share, a member's a part of one."""
    zeros = torch.zeros(1, HEADS, length, 8)
    weights = method(group, window).layer(0, 1).weights(zeros, zeros, 1.0, 0, length)
    for i in range(length):
        count = max(0, (i + 1 - window) // group)
        shares = count + i + 1 - group * count
        wanted = torch.zeros(length)
        wanted[: group * count] = 1 / group / shares
        wanted[group * count : i + 1] = 1 / shares
        close(weights[0, 0, i], wanted)
        assert window <= i + 1 - group * count < window + group or count == 0


def test_equal_keys_in_a_group_make_pooling_a_mean():
    query, key, value = inputs(40)
    key = key[:, :, ::4].repeat_interleave(4, dim=2)
    cores = method(4, 8).layer(0, 1)._pool(0, 0, query, key, value, 0.35)
    means = (t.unflatten(2, (10, 4)).mean(dim=3).repeat_interleave(2, dim=1) for t in (key, value))
    for found, wanted in zip(cores, means):
        close(found, wanted, **EXACT)


def test_weights_are_those_that_attend_uses():
    query, key, value = inputs(40)
    layer = method(4, 8, BandPattern.exclusive(HEADS, 10)).layer(0, 1)
    weights = layer.weights(query, key, 0.35, 0, 40)
    found = weights.double() @ value.repeat_interleave(2, dim=1)
    close(found, layer.attend(query, key, value, 0.35), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(("group", "window"), [(4, 8), (3, 3), (1, 2), (8, 16)])
def test_a_state_continues_across_groups(group, window):
    """Chunks that end within groups, at their ends, and hold several of them."""
    query, key, value = inputs(SPAN)
    layer = method(group, window).layer(0, 1)
    wanted = layer.attend(query, key, value, 0.35)
    for sizes in ([1] * SPAN, [5, 3, 1, 23, 16], [8, 8, 32], [47, 1]):
        state, found = State(), []
        for part in zip(*(t.split(sizes, dim=2) for t in (query, key, value))):
            found.append(layer.attend_after(state, *part, 0.35))
            state.length += part[0].shape[2]
        close(torch.cat(found, dim=2), wanted, **EXACT)


def test_the_cache_keeps_core_tokens_and_the_window():
    """In all layers alike."""
    model = related.apply(build("llama"), method(4, 8))
    with torch.no_grad():
        cache = model(tokens(1, 40), use_cache=True).past_key_values
    for layer in cache.layers:
        held = {name: list(t.shape) for name, t in layer.state.tensors.items()}
        assert held == {
            "core_key": [1, HEADS, 10, 8],
            "core_value": [1, HEADS, 10, 8],
            "key": [1, 2, 8, 8],
            "value": [1, 2, 8, 8],
        }
        assert layer.nbytes == 8 * 2 * (HEADS * 10 * 8 + 2 * 8 * 8)
        assert not any(t.requires_grad for t in layer.state.tensors.values())


def test_a_cache_of_other_attention_is_refused():
    model, ids = related.apply(build("llama"), method(4, 8)), tokens(1, 9)
    dense = transformers.DynamicCache(config=model.config)
    logits(build("llama"), ids, past_key_values=dense)
    with pytest.raises(ValueError, match="got 9 tokens of another attention in layer 0"):
        logits(model, ids, past_key_values=dense)
    cache = transformers.DynamicCache(config=model.config)
    logits(model, ids, past_key_values=cache)
    with pytest.raises(ValueError, match="must be read by the attention that filled it"):
        logits(build("llama"), ids, past_key_values=cache)
    other = related.apply(build("llama"), method(4, 12))
    with pytest.raises(ValueError, match="must have been filled by cca of"):
        logits(other, ids, past_key_values=cache)
    with pytest.raises(ValueError, match="must not be cropped"):
        cache.crop(-1)


def test_an_adapter_brings_cca_back(tmp_path):
    """It has no weights of its own."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    base = related.apply(build("llama"), method(4, 8))
    model, ids = peft.get_peft_model(base, settings).double(), tokens(1, 33)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path).double()
    close(logits(again, ids), logits(model, ids), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("bands", [None, BandPattern.exclusive(HEADS, 10)])
def test_pairs_are_those_of_the_picture(bands):
    """A core token counts once, however many members it has."""
    found = seen(method(4, 8, bands), SPAN).long()
    for length in (1, 7, 8, 11, 12, 30, 48):
        part = found[:, :length, :length]
        counted = (part == 1).sum() + (part == 2).sum() / 4
        assert method(4, 8, bands).pairs(length, 1) == counted


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"group": 4, "window": 18}, "must be a multiple of `group` = 4, got 18"),
        ({"group": 8, "window": 4}, "must be a multiple of `group` = 8, got 4"),
        ({"group": 0}, "`group` of `cca` must be an integer from 1 to 48, got 0"),
        ({"bands": BandPattern.exclusive(4, 48)}, "must have 4 heads and span 2, got 4 and 48"),
    ],
)
def test_wrong_values_raise(values, error):
    with pytest.raises(ValueError, match=error):
        CCA(HEADS, SPAN, **values)
