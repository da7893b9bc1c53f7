"""DGA, reconstructed: its rules query by query, its limits, and its leak."""

from __future__ import annotations

import pytest
import torch
from relatives import HEADS, SPAN, build, inputs, logits, tokens
from torch.nn.functional import scaled_dot_product_attention

from spattention import related
from spattention.baselines.state import State
from spattention.related import DGA
from spattention.related.dga import GroupAttention

close = torch.testing.assert_close
EXACT = {"rtol": 0.0, "atol": 1e-10}
FORMS = {
    "published": {"group": 4, "share": 0.25, "samples": 8},
    "causal": {"group": 3, "share": 0.25, "block": 10},
}
each_form = pytest.mark.parametrize("form", FORMS)


def layer(form, **values):
    return DGA(HEADS, SPAN, **{**FORMS[form], **values}).layer(0, 1)


def reference(query, key, value, split, scale=0.35):
    """The rules, query by query and head by head, for a given split."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    out = torch.empty_like(query)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            q, k, v = query[b, h], key[b, h], value[b, h]
            groups = [each.tolist() for each in split.members[b, h]]
            since = split.since[b, h].tolist()
            for i in range(len(q)):
                keys, values = [], []
                for j in split.single[b, h].tolist():
                    if j <= i:
                        keys.append(k[j])
                        values.append(v[j])
                for members, first in zip(groups, since):
                    if first <= i:
                        w = (q[members[-1]] @ k[members].T * scale).softmax(dim=0)
                        keys.append(w @ k[members])
                        values.append(w @ v[members])
                    else:
                        seen = [j for j in members if j <= i]
                        keys += list(k[seen])
                        values += list(v[seen])
                weights = (torch.stack(keys) @ q[i] * scale).softmax(dim=0)
                out[b, h, i] = weights @ torch.stack(values)
    return out


def split_of(form, given):
    query, key = given[0], given[1].repeat_interleave(2, dim=1)
    return layer(form).split(query, key, 0.35)


@each_form
@pytest.mark.parametrize("length", [48, 41, 7, 1])
def test_a_layer_is_its_rules(form, length):
    given = inputs(length)
    found = layer(form).attend(*given, 0.35)
    close(found, reference(*given, split_of(form, given)), **EXACT)


@each_form
def test_gradients_are_those_of_the_rules(form):
    given = [t.requires_grad_() for t in inputs(25)]
    split, weight = split_of(form, given), inputs(25, seed=1)[0]
    found = torch.autograd.grad((layer(form).attend(*given, 0.35) * weight).sum(), given)
    wanted = torch.autograd.grad((reference(*given, split) * weight).sum(), given)
    for mine, other in zip(found, wanted):
        close(mine, other, **EXACT)


@each_form
@pytest.mark.parametrize("values", [{"group": 1}, {"share": 1.0}])
def test_groups_of_one_and_all_focal_are_dense(form, values):
    query, key, value = inputs(SPAN)
    found = layer(form, **values).attend(query, key, value, 0.35)
    dense = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.35, enable_gqa=True
    )
    close(found, dense, **EXACT)


@each_form
@pytest.mark.parametrize("length", [48, 41, 7])
def test_every_token_is_single_or_in_one_group(form, length):
    split = split_of(form, inputs(length))
    every = torch.cat([split.single, split.members.flatten(2)], dim=2).sort(dim=2).values
    assert torch.equal(every, torch.arange(length).expand_as(every))
    assert (split.members.diff(dim=-1) > 0).all()
    assert (split.since >= split.members[..., -1]).all()


@each_form
def test_weights_are_those_that_attend_uses(form):
    query, key, value = inputs(45)
    weights = layer(form).weights(query, key, 0.35, 0, 45)
    assert not weights.triu(1).any()
    assert (weights.tril() > 0).sum() == weights[..., 0].numel() * 46 // 2  # each token once
    found = weights.double() @ value.repeat_interleave(2, dim=1)
    close(found, layer(form).attend(query, key, value, 0.35), rtol=0.0, atol=1e-5)


def test_importance_is_the_attention_of_the_samples():
    query, key, _ = inputs(SPAN)
    key = key.repeat_interleave(2, dim=1)
    weights = layer("published").method.layer(0, 1)
    dense = (query @ key.mT * 0.35).masked_fill(
        ~torch.ones(SPAN, SPAN, dtype=torch.bool).tril(), -torch.inf
    )
    dense = dense.softmax(dim=-1)
    every = layer("published", samples=SPAN).importance(query, key, 0.35)
    close(every, dense.sum(dim=2), **EXACT)
    close(layer("published", samples=1).importance(query, key, 0.35), dense[:, :, -1], **EXACT)
    rows = [round(k * 47 / 7) for k in range(8)]
    close(weights.importance(query, key, 0.35), dense[:, :, rows].sum(dim=2), **EXACT)


def test_the_published_form_leaks():
    """An edit changes earlier outputs, since later queries choose what is grouped."""
    given = inputs(SPAN)
    before = layer("published").attend(*given, 0.35)
    edited = [t.clone() for t in given]
    for tensor in edited[:2]:
        tensor[:, :, 40] *= 9
    after = layer("published").attend(*edited, 0.35)
    assert (after != before)[:, :, :40].any()


def test_published_form_is_causal_with_fixed_choice(monkeypatch):
    model, ids = (
        related.apply(build("llama"), DGA(HEADS, SPAN, **FORMS["published"])),
        tokens(1, SPAN),
    )
    table = torch.rand(1, HEADS, SPAN, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(GroupAttention, "importance", lambda *_: table)
    before = logits(model, ids)
    for t in (0, 20, 47):
        edited = ids.clone()
        edited[0, t] = 2 + (ids[0, t] - 1) % 50
        after = logits(model, edited)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after != before).any(dim=-1)[0, t:].all() or t == 0


@pytest.mark.parametrize(("block", "group"), [(10, 3), (8, 8), (16, 4), (1, 1)])
def test_the_causal_variant_continues_exactly(block, group):
    given = inputs(SPAN)
    chosen = layer("causal", block=block, group=group)
    wanted = chosen.attend(*given, 0.35)
    for sizes in ([1] * SPAN, [5, 3, 1, 23, 16], [10, 10, 28], [47, 1]):
        state, found = State(), []
        for part in zip(*(t.split(sizes, dim=2) for t in given)):
            found.append(chosen.attend_after(state, *part, 0.35))
            state.length += part[0].shape[2]
        close(torch.cat(found, dim=2), wanted, **EXACT)


@pytest.mark.parametrize(
    ("form", "held"),
    [
        ("published", {"key": 12 + 9}),
        # Four whole blocks with 2 focal tokens, 2 groups and 2 tokens that fill none, and 8 tokens.
        ("causal", {"key": 4 * 6, "open_key": 8}),
    ],
)
def test_the_cache_holds_single_tokens_and_groups(form, held):
    model = related.apply(build("llama"), DGA(HEADS, SPAN, **FORMS[form]))
    with torch.no_grad():
        cache = model(tokens(1, SPAN), use_cache=True).past_key_values
    for layer in cache.layers:
        for name, count in held.items():
            assert layer.state.tensors[name].shape[2] == count


def test_generation_goes_on_from_the_grouped_prompt():
    """Later tokens stay as they are: the step attends what the prompt became, and itself."""
    given = inputs(40)
    state, chosen = State(), layer("published")
    prompt = [t[:, :, :39] for t in given]
    chosen.attend_after(state, *prompt, 0.35)
    found = chosen.attend_after(state, *(t[:, :, 39:] for t in given), 0.35)
    split = split_of("published", prompt)
    query = torch.cat([prompt[0], given[0][:, :, 39:]], dim=2)
    single = torch.cat([split.single, split.single.new_full((2, HEADS, 1), 39)], dim=2)
    wanted = reference(query, *given[1:], split._replace(single=single))
    close(found, wanted[:, :, 39:], **EXACT)


def test_pairs_of_the_causal_variant_match_its_mask():
    from spattention.related.dga import _mask

    method = DGA(HEADS, SPAN, **FORMS["causal"])
    for length in (1, 9, 10, 11, 48):
        split = split_of("causal", inputs(length))
        mask = _mask(split, torch.arange(length), length)
        assert method.pairs(length, 1) == mask[0].sum()


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"group": 0}, "`group` of `dga` must be an integer from 1"),
        ({"share": 0.0}, "`share` of `dga` must be above 0 and at most 1, got 0.0"),
        ({"share": True}, "`share` of `dga` must be a number, got True"),
        ({"block": -1}, "`block` of `dga` must be an integer from 0"),
    ],
)
def test_wrong_values_raise(values, error):
    with pytest.raises(ValueError, match=error):
        DGA(HEADS, SPAN, **values)
