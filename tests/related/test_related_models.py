"""Related systems in models of Transformers: causality, caches, saving, and refusals."""

from __future__ import annotations

import re
from copy import deepcopy

import pytest
import torch
import transformers
from relatives import (
    CHOSEN,
    HEADS,
    LAYERS,
    LLAMA_ALONE,
    NOT_CAUSAL,
    SPAN,
    build,
    logits,
    scatter,
    tokens,
)

from spattention import BandPattern, related
from spattention.baselines import seen
from spattention.evaluation.heads import head_statistics
from spattention.related import MEA

close = torch.testing.assert_close
EXACT = {"rtol": 0.0, "atol": 1e-9}
GREEDY = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
each = pytest.mark.parametrize("name", CHOSEN)
causal = pytest.mark.parametrize("name", [name for name in CHOSEN if name not in NOT_CAUSAL])
WEIGHTED = [name for name in CHOSEN if CHOSEN[name].kind in ("mea", "recurrent_near")]


def family_of(name):
    return "llama" if name in LLAMA_ALONE else "olmoe"


def model_with(name, family=None, **overrides):
    model = build(family or family_of(name), **overrides)
    return scatter(related.apply(model, CHOSEN[name]))


@causal
def test_every_step_of_a_cache_equals_the_whole(name):
    """Token by token, and a prompt in two chunks: the logits at all positions."""
    model, ids = model_with(name), tokens(2, SPAN)
    wanted = logits(model, ids)
    for sizes in ([1] * SPAN, [17, 1, 1, 20, 9], [20, 28]):
        cache, found = transformers.DynamicCache(config=model.config), []
        for part in ids.split(sizes, dim=1):
            found.append(logits(model, part, past_key_values=cache, use_cache=True))
        close(torch.cat(found, dim=1), wanted, **EXACT)


@causal
def test_beams_follow_their_rows(name):
    model, ids = model_with(name), tokens(2, 21)
    settings = {**GREEDY, "num_beams": 3}
    wanted = model.generate(ids, use_cache=False, **settings)
    assert model.generate(ids, **settings).tolist() == wanted.tolist()


@each
def test_model_from_config_equals_the_applied_one(name):
    model = model_with(name)
    fresh = transformers.AutoModelForCausalLM.from_config(
        model.config, experts_implementation="eager"
    )
    fresh.double().eval().load_state_dict(model.state_dict())
    close(logits(fresh, tokens(2, 9)), logits(model, tokens(2, 9)), **EXACT)


@each
def test_a_copied_model_is_a_model_of_its_own(name):
    model, ids = model_with(name), tokens(2, 21)
    wanted, copied = logits(model, ids), deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    close(logits(copied, ids), wanted, **EXACT)


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_checkpoint_without_its_weights_fails(name, tmp_path):
    """Transformers would only warn, and leave them as memory happened to be."""
    model, kind = model_with(name), CHOSEN[name].kind
    key = min(key for key in model.state_dict() if key.endswith(("mixing", "gain", "decay")))
    for number, (change, got) in enumerate(
        (
            ({key: None}, f"no {key}"),
            ({key: torch.zeros(77)}, f"{key} of another shape"),
            ({f"{key}s": torch.zeros(1)}, f"{key}s, which has no place in it"),
        )
    ):
        state = {n: t for n, t in (model.state_dict() | change).items() if t is not None}
        folder = tmp_path / str(number)
        model.save_pretrained(folder, state_dict=state)
        with pytest.raises(ValueError, match=re.escape(f"`config.{kind}` asks for, got {got}")):
            transformers.AutoModelForCausalLM.from_pretrained(
                folder, ignore_mismatched_sizes=True, experts_implementation="eager"
            )


@each
def test_gradients_reach_every_weight_of_attention(name):
    model, ids = model_with(name).train(), tokens(2, 40)
    model(ids, labels=ids).loss.backward()
    for key, parameter in model.named_parameters():
        if "self_attn" in key:
            assert torch.isfinite(parameter.grad).all(), key
            assert parameter.grad.abs().sum() > 0, key


def test_damaged_bands_of_a_section_are_refused():
    section = CHOSEN["mea_exclusive"].section()
    with pytest.raises(ValueError, match="`bands` of `mea` must have 4 heads and span 48, got 2"):
        MEA.from_section({**section, "bands": BandPattern.dense(2, SPAN).to_dict()})
    with pytest.raises(ValueError, match="must"):
        MEA.from_section({**section, "bands": [1]})


@each
def test_heads_can_be_looked_at(name):
    model, ids = model_with(name), tokens(1, 40)
    found = head_statistics(model, ids)
    assert len(found) == LAYERS
    for layer in found:
        assert all(0 <= each < 40 for each in layer.distance)


@each
def test_a_picture_shows_the_past_alone(name):
    found = seen(CHOSEN[name], 40)
    assert found.shape == (HEADS, 40, 40)
    assert found.any()
    assert not found.triu(1).any()


@pytest.mark.parametrize("other", [None, BandPattern.exclusive(4, 64), "mea"])
def test_what_is_no_system_is_named(other):
    with pytest.raises(ValueError, match="`baseline` must be a baseline or related system"):
        related.apply(None, other)
