"""Recurrent near heads: the recurrence token by token, the heads that stay, and the ratio."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from relatives import EXCLUSIVE, HEADS, SPAN, build, inputs, logits, scatter, tokens

import spattention as spa
from spattention import BandPattern, related
from spattention.baselines import seen
from spattention.related import RecurrentNear, near_heads, recency_ratio, recurrent_near
from spattention.related.method import causal_attention
from spattention.related.recurrent_near import first_decay, retain
from tests.fitting.attending import profile_of

close = torch.testing.assert_close
EXACT = {"rtol": 0.0, "atol": 1e-10}


def reference(query, key, value, decay, scale, memory=None):
    """The recurrence, token by token."""
    batch, heads, length, size = query.shape
    state = torch.zeros(batch, heads, size, value.shape[-1]).to(query)
    state = state if memory is None else memory
    outs = []
    for t in range(length):
        state = decay.exp()[:, None, None] * state + key[:, :, t, :, None] * value[:, :, t, None]
        outs.append(scale * (query[:, :, t, None] @ state)[:, :, 0])
    return torch.stack(outs, dim=2), state


def drawn(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((2, 3, length, 5), (2, 3, length, 5), (2, 3, length, 4))
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


DECAY = torch.tensor([-0.001, -0.2, -3.0], dtype=torch.float64)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130])
def test_chunks_are_the_recurrence(length):
    given = drawn(length)
    memory = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    for before in (None, memory):
        found = retain(*given, DECAY, 0.4, before)
        for mine, wanted in zip(found, reference(*given, DECAY, 0.4, before)):
            close(mine, wanted, **EXACT)


def test_gradients_are_those_of_the_recurrence():
    given = [t.requires_grad_() for t in (*drawn(70), DECAY.clone())]
    weight = drawn(70, seed=1)[2]
    found = torch.autograd.grad((retain(*given, 0.4)[0] * weight).sum(), given)
    wanted = torch.autograd.grad((reference(*given, 0.4)[0] * weight).sum(), given)
    for mine, other in zip(found, wanted):
        close(mine, other, **EXACT)


def test_recurrence_of_flash_linear_attention():
    pytest.importorskip("fla")
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

    query, key, value = (t.float() for t in drawn(40))
    turned = [t.transpose(1, 2) for t in (query, key, value)]
    decay = DECAY.float()
    wanted, memory = naive_recurrent_simple_gla(*turned, decay.expand(2, 40, -1), scale=0.4)
    found = retain(query, key, value, decay, 0.4)
    close(found[0], wanted.transpose(1, 2), rtol=0.0, atol=1e-5)
    close(found[1], memory, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("bands", [None, EXCLUSIVE])
def test_other_heads_attend_as_before(bands):
    query, key, value = inputs(40)
    found = RecurrentNear(HEADS, SPAN, bands, recurrent=2).layer(0, 1)
    out = found.attend(query, key, value, 0.35)
    wanted = causal_attention(query, key, value, 0.35, bands)
    close(out[:, 2:], wanted[:, 2:], **EXACT)
    decay = torch.nn.functional.logsigmoid(first_decay(2).double())
    plain, _ = reference(query[:, :2], key[:, [0, 0]], value[:, [0, 0]], decay, 0.35)
    norm = (plain.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    close(out[:, :2], plain / norm, rtol=0.0, atol=1e-6)  # decays start in float32


def test_a_picture_shows_recurrent_heads_as_groups():
    found = seen(RecurrentNear(HEADS, SPAN, EXCLUSIVE, recurrent=2), SPAN)
    past = torch.ones(SPAN, SPAN, dtype=torch.uint8).tril()
    assert torch.equal(found[:2], 2 * past.expand(2, -1, -1))
    assert torch.equal(found[2:], EXCLUSIVE.mask(SPAN)[2:].to(torch.uint8))


def test_memories_start_at_powers_of_two():
    gamma = torch.sigmoid(first_decay(7).double())
    close(1 / (1 - gamma), torch.tensor([8.0, 16, 32, 64, 128, 256, 8]).double(), rtol=1e-4, atol=0)


def test_model_is_as_it_was_without_recurrent_heads():
    for family in ("llama", "olmoe"):
        model, ids = build(family), tokens(2, 33)
        names, wanted = [n for n, _ in model.named_parameters()], logits(model, ids)
        related.apply(model, RecurrentNear(HEADS, SPAN, recurrent=0))
        assert torch.equal(logits(model, ids), wanted)
        assert [n for n, _ in model.named_parameters()] == names
        banded = spa.hf.apply(build(family), EXCLUSIVE)
        model = related.apply(build(family), RecurrentNear(HEADS, SPAN, EXCLUSIVE, recurrent=0))
        assert torch.equal(logits(model, ids), logits(banded, ids))


def test_the_cache_holds_other_heads_and_a_state():
    bands = BandPattern.sliding_window(HEADS, SPAN, 6)
    for chosen, held in ((None, 40), (bands, 5)):
        model = related.apply(build("llama"), RecurrentNear(HEADS, SPAN, chosen, recurrent=2))
        with torch.no_grad():
            cache = model(tokens(1, 40), use_cache=True).past_key_values
        for layer in cache.layers:
            shapes = {name: list(t.shape) for name, t in layer.state.tensors.items()}
            tail = [1, 1, held, 8]
            assert shapes == {"memory": [1, 2, 8, 8], "key": tail, "value": tail}
            assert layer.nbytes == 8 * (2 * 8 * 8 + 2 * held * 8)


def test_recurrent_heads_of_each_layer_are_saved(tmp_path):
    method = RecurrentNear(HEADS, SPAN, heads=((2, 3), (), (0, 1, 2, 3)))
    model, ids = scatter(related.apply(build("llama"), method)), tokens(1, 20)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    close(logits(again, ids), logits(model, ids), **EXACT)
    decays = [n for n, _ in again.named_parameters() if n.endswith("decay")]
    assert decays == [f"model.layers.{k}.self_attn.recurrent_heads.decay" for k in (0, 2)]
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for damaged in ([[2, 3]], [[2], [], []], "all", [["2"], [], []], [[3, 2], [], []], 3):
        config["recurrent_near"]["heads"] = damaged
        file.write_text(json.dumps(config))
        with pytest.raises(ValueError, match="heads"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_ratio_of_uniform_attention_and_of_a_window():
    """Row i of n = i + 1 keys holds min(n, k + 1) / n within k tokens; a window holds all."""
    length, within = 40, 4
    uniform = torch.ones(length, length).tril().double()
    window = uniform.triu(-within)
    weights = torch.stack([w / w.sum(dim=1, keepdim=True) for w in (uniform, window)])
    ratio = recency_ratio(profile_of(weights[None]), within)
    wanted = sum(min(n, within + 1) / n for n in range(1, length + 1)) / length
    close(ratio, torch.tensor([[wanted, 1.0]]).double(), rtol=0.0, atol=1e-6)
    with pytest.raises(ValueError, match="must be one less than an edge of the profile's bins"):
        recency_ratio(profile_of(weights[None]), 10**6)


def test_near_heads_go_by_key_heads():
    """Of two query heads of a key head, the mean decides for both."""
    uniform = torch.ones(40, 40).tril().double()
    near, far = (w / w.sum(dim=1, keepdim=True) for w in (uniform.triu(-2), uniform))
    layers = torch.stack([torch.stack(each) for each in ([near, near, far, near], [far] * 4)])
    assert near_heads(profile_of(layers), 2, 0.9) == ((0, 1), ())
    assert near_heads(profile_of(layers), 2, 0.5) == ((0, 1, 2, 3), ())
    method = RecurrentNear(HEADS, SPAN, heads=near_heads(profile_of(layers), 2, 0.9))
    related.apply(build("llama", num_hidden_layers=2), method)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"recurrent": 5}, "`recurrent` of `recurrent_near` must be an integer from 0 to 4, got 5"),
        ({"recurrent": 1, "heads": ((0,),)}, "must not be given with `heads`, got 1"),
        ({"heads": ((1, 0),)}, "must hold increasing indices below 4 for each layer"),
        ({"heads": ((4,),)}, "must hold increasing indices below 4 for each layer"),
        ({"heads": ()}, "must be a tuple with one entry per layer"),
    ],
)
def test_wrong_values_raise(values, error):
    with pytest.raises(ValueError, match=error):
        RecurrentNear(HEADS, SPAN, **values)


def test_models_that_do_not_fit_stay_as_they_are():
    for method, error in (
        (RecurrentNear(HEADS, SPAN, recurrent=1), "must be all 2 query heads of a key/value head"),
        (RecurrentNear(HEADS, SPAN, heads=((), ())), "must have an entry for each of 3 layers"),
    ):
        model = build("llama")
        names = [name for name, _ in model.named_parameters()]
        with pytest.raises(ValueError, match=error):
            related.apply(model, method)
        assert [name for name, _ in model.named_parameters()] == names


def test_bands_of_some_heads_keep_their_prefix() -> None:
    pattern = BandPattern.exclusive(4, 64, prefix=4)
    part = recurrent_near._part(pattern, (1, 3))
    assert part is not None
    assert part.prefix == 4
    assert part.intervals == (pattern.intervals[1], pattern.intervals[3])


def test_what_is_no_profile_is_named() -> None:
    with pytest.raises(ValueError, match="`profile` must be a Profile, got NoneType"):
        recurrent_near.near_heads(None, 8, 0.5)  # type: ignore[arg-type]


def test_a_state_is_wide_whatever_its_inputs_are():
    """States of half-precision inputs add up in float32, and differ by rounding alone."""
    given = [t.to(torch.bfloat16) for t in drawn(150)]
    out, memory = retain(*given, DECAY.float(), 0.4)
    assert memory.dtype == out.dtype == torch.float32
    exact = reference(*(t.double() for t in given), DECAY, 0.4, None)
    for mine, wanted in zip((out, memory), exact):
        close(mine.double(), wanted, rtol=1e-4, atol=1e-4)


def test_chunks_compile_into_a_few_operations():
    """The graph of a long text is as large as that of a short one: there is no loop over chunks."""
    sizes = []

    def record(module, inputs):
        sizes.append(len(module.graph.nodes))
        return module.forward

    for length in (192, 1024):
        torch._dynamo.reset()
        torch.compile(retain, backend=record)(*drawn(length), DECAY, 0.4)
    assert sizes[0] == sizes[1]
