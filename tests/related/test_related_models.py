"""Related systems in models of Transformers: causality, caches, saving, and refusals."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
import transformers
from relatives import (
    CHOSEN,
    EXCLUSIVE,
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
from spattention.choice import attention_choice
from spattention.cli import main
from spattention.evaluation.heads import head_statistics
from spattention.related import CCA, DGA, MEA, Elementwise, RecurrentNear, RRAttention

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


def families(name):
    return ("llama",) if name in LLAMA_ALONE else ("llama", "olmoe")


@causal
def test_an_edit_changes_later_outputs_alone(name):
    for family in families(name):
        model, ids = model_with(name, family), tokens(1, SPAN)
        before = logits(model, ids)
        for t in (0, 20, SPAN - 1):
            edited = ids.clone()
            edited[0, t] = 2 + (ids[0, t] - 1) % 50
            after = logits(model, edited)
            assert torch.equal(after[:, :t], before[:, :t])
            changed = (after != before).any(dim=-1)[0]
            assert changed[t]
            assert t == SPAN - 1 or changed[t + 1 :].any()


@causal
def test_cached_generation_equals_recomputation(name):
    for family in families(name):
        model, ids = model_with(name, family), tokens(2, 31)
        wanted = model.generate(ids, use_cache=False, **GREEDY)
        assert model.generate(ids, **GREEDY).tolist() == wanted.tolist()


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
def test_a_saved_model_comes_back(name, tmp_path):
    for family in families(name):
        model, ids = model_with(name, family), tokens(2, 33)
        wanted, folder = logits(model, ids), tmp_path / family
        model.save_pretrained(folder)
        again = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, experts_implementation="eager"
        )
        close(logits(again.eval(), ids), wanted, **EXACT)
        saved = json.loads((folder / "config.json").read_text())
        kind = CHOSEN[name].kind
        assert saved["attn_implementation"] == kind
        assert type(CHOSEN[name]).from_section(saved[kind]) == CHOSEN[name]


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


@each
def test_a_step_under_autocast_is_near_one_without(name):
    model, ids = model_with(name).float(), tokens(2, 33)
    wanted = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids, labels=ids).loss
    found.backward()
    close(found, wanted, rtol=0.0, atol=0.1)


@each
def test_what_cannot_be_honoured_raises(name):
    model, ids, kind = model_with(name), tokens(2, 9), CHOSEN[name].kind
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    with pytest.raises(ValueError, match="`attention_mask` must have no padding"):
        model(ids, attention_mask=padding)
    with pytest.raises(ValueError, match=f"at most the {SPAN} tokens that {kind} was made for"):
        model(tokens(1, SPAN + 1))
    with pytest.raises(ValueError, match="cache"):
        model.generate(ids, cache_implementation="static", **GREEDY)
    cache = transformers.DynamicCache(config=model.config)
    logits(model, tokens(1, SPAN), past_key_values=cache)
    with pytest.raises(ValueError, match=f"at most the {SPAN} tokens that {kind} was made for"):
        model(tokens(1, 1), past_key_values=cache)


@each
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "must be a section of version 1"),
        ({"more": 0}, "must have the entries"),
        ({"span": "48"}, "`span` of `.*` must be an integer"),
        ({"num_heads": 0}, "`num_heads` of `.*` must be an integer from 1"),
    ],
)
def test_a_damaged_section_is_refused(change, message, name, tmp_path):
    model_with(name).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config[CHOSEN[name].kind] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_damaged_bands_of_a_section_are_refused():
    section = CHOSEN["mea_exclusive"].section()
    with pytest.raises(ValueError, match="`bands` of `mea` must have 4 heads and span 48, got 2"):
        MEA.from_section({**section, "bands": BandPattern.dense(2, SPAN).to_dict()})
    with pytest.raises(ValueError, match="must"):
        MEA.from_section({**section, "bands": [1]})


FORGET = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="sdpa")
    print("opened")
except ValueError as error:
    print(error)
"""


def test_a_process_without_the_library_fails(tmp_path):
    model_with("mea").save_pretrained(tmp_path)
    command = [sys.executable, "-c", FORGET, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True).stdout
    assert "mea: spattention.related.register() must be called before this model is" in found


@each
def test_heads_can_be_looked_at(name):
    model, ids = model_with(name), tokens(1, 40)
    found = head_statistics(model, ids)
    assert len(found) == LAYERS
    for layer in found:
        assert all(0 <= each < 40 for each in layer.distance)


NAMES = {
    "mea": MEA(HEADS, SPAN),
    "mea:norm=0": MEA(HEADS, SPAN, norm=0),
    "mea:bands=exclusive": MEA(HEADS, SPAN, EXCLUSIVE),
    "mea:mix=0,bands=shared_local:widths=geometric,local=6": MEA(
        HEADS, SPAN, BandPattern.shared_local(HEADS, SPAN, widths="geometric", local=6), mix=0
    ),
    "cca": CCA(HEADS, SPAN, group=16, window=16),
    "cca:group=4,window=12": CCA(HEADS, SPAN, group=4, window=12),
    "cca:group=4,bands=exclusive": CCA(
        HEADS, SPAN, BandPattern.exclusive(HEADS, 9), group=4, window=12
    ),
    "rrattention": RRAttention(HEADS, SPAN),
    "rrattention:block=8,tau=0.8,bands=exclusive": RRAttention(
        HEADS, SPAN, EXCLUSIVE, block=8, tau=0.8
    ),
    "dga:group=4,share=0.25": DGA(HEADS, SPAN, group=4, share=0.25),
    "dga:group=4,block=24": DGA(HEADS, SPAN, group=4, block=24),
    "recurrent_near:recurrent=2": RecurrentNear(HEADS, SPAN, recurrent=2),
    "recurrent_near:recurrent=2,bands=exclusive": RecurrentNear(
        HEADS, SPAN, EXCLUSIVE, recurrent=2
    ),
    "elementwise:order=2,scale=1,bound=3": Elementwise(HEADS, SPAN, order=2, scale=1.0, bound=3.0),
    "elementwise:bands=exclusive": Elementwise(HEADS, SPAN, EXCLUSIVE),
}


@pytest.mark.parametrize("text", NAMES)
def test_commands_name_them(text):
    choice, wanted = attention_choice(text, HEADS, SPAN), NAMES[text]
    assert choice.name == text
    model = build("llama")
    choice.apply(model)
    assert type(wanted).from_section(getattr(model.config, wanted.kind)) == wanted
    assert choice.pairs(SPAN) == wanted.pairs(SPAN, LAYERS)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("mea:window=3", "options of `mea` are NAME=VALUE with a name of"),
        ("mea:norm=2", "`norm` of `mea` must be an integer from 0 to 1, got 2"),
        ("mea:bands=exclusiv", "did you mean 'exclusive'"),
        ("mea:norm=0bands=exclusive", "must be separated by commas"),
        ("mea:bands=exclusive,norm=0", "`bands` of `mea` must come last"),
        ("rrattention:tau=x", "option `tau` of `rrattention` must be a number, got 'x'"),
        ("rrattention:tau=1.5", "must be above 0 and at most 1, got 1.5"),
        ("mae", "must be one of"),
    ],
)
def test_commands_refuse_what_they_do_not_know(text, error):
    with pytest.raises(ValueError, match=error):
        attention_choice(text, HEADS, SPAN)


def test_naming_bands_imports_no_relative():
    code = (
        "import sys; from spattention.choice import attention_choice;"
        "attention_choice('exclusive', 4, 48);"
        "assert not any('related' in name for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@each
def test_a_picture_shows_the_past_alone(name):
    found = seen(CHOSEN[name], 40)
    assert found.shape == (HEADS, 40, 40)
    assert found.any()
    assert not found.triu(1).any()


@pytest.mark.parametrize("text", NAMES)
def test_draw_writes_a_picture(text, tmp_path, capsys):
    output = tmp_path / "a.png"
    sizes = ["--heads", "4", "--span", "48", "--dots-per-inch", "40"]
    assert main(["draw", text, *sizes, "--output", str(output)]) == 0, capsys.readouterr().err
    assert output.stat().st_size > 1000


@pytest.mark.parametrize("other", [None, BandPattern.exclusive(4, 64), "mea"])
def test_what_is_no_system_is_named(other):
    with pytest.raises(ValueError, match="`baseline` must be a baseline or related system"):
        related.apply(None, other)
