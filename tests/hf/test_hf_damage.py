"""Saved folders that are damaged, foreign or absurd: refused by name before memory is taken."""

from __future__ import annotations

import json
import os

import pytest
import safetensors.torch
import torch
import transformers
from tiny import FIRST, HEADS, SECOND, P, banded, build

import spattention as spa


@pytest.fixture
def folder(tmp_path):
    banded("llama", (FIRST, SECOND), sinks=True).save_pretrained(tmp_path)
    return tmp_path


def change_config(folder, **change):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def section(**change):
    patterns = [FIRST.to_dict(), SECOND.to_dict()]
    return {"version": 1, "patterns": patterns, "layers": [0, 1], "sinks": True, **change}


def pattern(**change):
    return section(patterns=[FIRST.to_dict(), {**SECOND.to_dict(), **change}])


def with_span(span):
    return section(patterns=[P.dense(HEADS, span).to_dict()], layers=[0, 0])


SECTIONS = [
    ([section()], r"`config\.spattention` must be a mapping, got list"),
    ("bands", r"`config\.spattention` must be a mapping, got str"),
    (7, r"`config\.spattention` must be a mapping, got int"),
    ({}, "must have version 1"),
    ({"bands": True}, "must have version 1"),
    (section(version=3), "must have version 1 .* got 3"),
    (section(version="1"), "must have version 1 .* got '1'"),
    (section(patterns={"0": 1}), "must have a list of `patterns`"),
    (section(patterns=[]), "None or an index below 0"),
    (section(patterns=["exclusive", None]), "pattern 0: a pattern must be a mapping, got str"),
    (section(layers=None), "one entry of `layers` per text layer, 2, got None"),
    (section(layers=[0] * 40), "one entry of `layers` per text layer, 2"),
    (section(layers=[0, -1]), "None or an index below 2"),
    (section(sinks=None), "must have a bool for `sinks`, got None"),
    (section(sinks=False), "must name the sinks that the checkpoint holds"),
    (pattern(version=9), "pattern 1: the pattern's `version` must be"),
    (pattern(span="24"), "pattern 1: `span` must be"),
    (pattern(span=-1), "pattern 1: `span` must be"),
    (pattern(intervals=None), "pattern 1: `intervals`"),
    (pattern(intervals=[[[5, 3]]] * HEADS), "pattern 1: "),
    (pattern(intervals=[[[0, 2]]] * 3), "`pattern` has 3 heads but layer 1 of the model has 4"),
    (pattern(intervals=[[[0, 2**70]]] * HEADS), "pattern 1: "),
    (pattern(span=2**63), "pattern 1: `span` must fit in 64 bits"),
    (pattern(span=2**31), "pattern 1: `span` must be at most 2147483647"),
    (with_span(2**29 + 1), "`span` of a pattern .* must be at most 536870912 tokens"),
    (with_span(2**30), "`span` of a pattern .* got 1073741824 in pattern 0"),
]


@pytest.mark.parametrize(("found", "message"), SECTIONS)
def test_a_damaged_section_is_refused(found, message, folder):
    change_config(folder, spattention=found)
    with pytest.raises(ValueError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("span", [2**29 + 1, 2**31 - 1])
def test_apply_refuses_an_absurd_span(span):
    model = build("llama")
    with pytest.raises(ValueError, match=r"`span` of a pattern .* must be at most 536870912"):
        spa.hf.apply(model, P.dense(HEADS, span))
    assert not hasattr(model.config, "spattention")


def cut(folder, name, size=40):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:size])


def without_sinks(folder):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights = {name: weight for name, weight in weights.items() if "sinks" not in name}
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})


def short_sinks(folder):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.sinks"] = torch.zeros(HEADS + 1)
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: cut(folder, "config.json"), r"config file at '.*config\.json' is not"),
        (lambda folder: (folder / "config.json").write_bytes(b"\x80\xff" * 9), r"config\.json'"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: cut(folder, "model.safetensors"), "(?i)header"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"no file named model\.safetens"),
        (without_sinks, r"must hold the sinks .* got no model\.layers\.0\.self_attn\.sinks"),
        (short_sinks, "`ignore_mismatched_sizes`"),
        (lambda folder: change_config(folder, num_hidden_layers=3), "per text layer, 3"),
        (lambda folder: change_config(folder, num_attention_heads=8), "has 4 heads but layer 0"),
        (lambda folder: change_config(folder, attn_implementation="sdpa"), 'got "sdpa", which'),
        (lambda folder: change_config(folder, attn_implementation="bands"), '"bands"'),
        (
            lambda folder: change_config(folder, bigbird={"version": 1}, fusion_config=None),
            '`attn_implementation` must be "bigbird" .* got "spattention"',
        ),
    ],
)
def test_a_damaged_folder_is_refused(harm, message, folder):
    from spattention import baselines

    baselines.register()
    harm(folder)
    with pytest.raises((ValueError, OSError, RuntimeError, safetensors.SafetensorError)) as error:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    error.match(message)


def test_sinks_of_another_size_are_never_ignored(folder):
    short_sinks(folder)
    with pytest.raises(ValueError, match=r"a sink per head, \[4\], got .*sinks of shape \[5\]"):
        transformers.AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_an_unreadable_file_is_named(name, folder):
    (folder / name).chmod(0)
    with pytest.raises(OSError, match=name):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
