"""Calls beside the main one of the benchmark of conversions: answers by layer, kept weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import tyro
from transformers import LlamaConfig, LlamaForCausalLM

import spattention as spa
from benchmarks.conversion import __main__ as conversion
from benchmarks.conversion import layers
from spattention.data.tokenizer import for_transformers, train_tokenizer

PAGE = "It was a dark night. The captain said to the crew 0123456789: "


@pytest.fixture
def given(tmp_path):
    """Arguments of a tiny model, its text and its profile."""
    torch.manual_seed(0)
    tokenizer = for_transformers(train_tokenizer([PAGE * 20], 300), 256, 0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    ids = tokenizer(PAGE * 40, add_special_tokens=False)["input_ids"]
    (tmp_path / "text").mkdir()
    for name in ("train_books", "val_books", "val_long"):
        np.array(ids, "<u2").tofile(tmp_path / "text" / f"{name}.u16")
    rows = [torch.tensor(ids[:96])]
    spa.hf.profile(model, rows, sensitivity=1, progress=False).save(tmp_path / "profile.json")
    places = [f"--{name}={tmp_path / name}" for name in ("model", "text", "profile")]
    places[-1] += ".json"
    return [*places, "--pairs", "0.8", "--context", "96", "--trials", "2", "--commit", "abc"]


def test_answers_are_asked_by_dense_layer(given, tmp_path):
    """Rows within the budget, then layers opened beyond it."""
    output = tmp_path / "found.json"
    more = ["--output", str(output), "--lengths", "96", "--refitted", "0"]
    layers.main(tyro.cli(layers.Options, args=[*given, *more]))
    found = json.loads(output.read_text())["rows"]
    names = ["dense", "fitted", "question dense", "dense 0", "opened 0", "opened 1"]
    assert [row["row"] for row in found] == names
    assert all(row["pairs"] <= 0.8 for row in found[1:4])
    assert all(set(row["answers"]) == {"96 at 0.1", "96 at 0.3"} for row in found)
    means = {row["row"]: row["answers"]["96 at 0.1"]["mean"] for row in found}
    assert len(set(means.values())) > 4
    assert all(mean < 0 for mean in means.values())


@pytest.mark.parametrize("row", ["fitted", "window-sinks", "fitted-lora"])
def test_kept_weights_are_measured_untrained(given, tmp_path, row):
    """A later call measures what an earlier one trained, and trains nothing."""

    def call(name, *more):
        parts = [
            "--parts",
            "loss",
            "--windows",
            "2",
            "--passkey-lengths",
            "96",
            "--ruler-lengths",
            "96",
        ]
        parts += [
            "--rows",
            row,
            "--tokens",
            "0.002",
            "--batch",
            "2",
            "--micro-batch",
            "1",
            "--rate",
            "0.01",
        ]
        output = tmp_path / f"{name}.json"
        args = [*given, *parts, "--output", str(output), *more]
        conversion.main(tyro.cli(conversion.Options, args=args))
        return json.loads(output.read_text())["rows"][0]

    weights = f"--weights={tmp_path / 'weights'}"
    first, again = call("first", weights), call("again", weights, "--rate", "0.02")
    assert again["train"] == first["train"]
    assert again["loss"] == first["loss"] != call("other", "--rate", "0.02")["loss"]
    assert len(list((tmp_path / "weights").iterdir())) == 1


def test_given_patterns_are_taken(given, tmp_path):
    """Rows that a file names take its patterns; a row that would be fitted anew is refused."""
    kept = [
        spa.BandPattern.sliding_window(4, 256, 8 + layer, prefix=2).to_dict() for layer in (0, 1)
    ]
    (tmp_path / "fitted.json").write_text(json.dumps({"rows": {"fitted at 96": kept}}))
    output = tmp_path / "found.json"
    more = ["--tokens", "0", "--parts", "loss", "--passkey-lengths", "96", "--ruler-lengths", "96"]
    more += [f"--patterns={tmp_path / 'fitted.json'}", "--output", str(output), "--rows"]

    def call(*rows):
        conversion.main(tyro.cli(conversion.Options, args=[*given, *more, *rows]))

    call("dense", "fitted", "fitted-prefix-sinks", "5:1")
    found = {row["row"]: row for row in json.loads(output.read_text())["rows"]}
    assert found["fitted"]["patterns"] == found["fitted-prefix-sinks"]["patterns"] == "fitted.json"
    assert (
        found["fitted"]["pairs"]
        == found["fitted-prefix-sinks"]["pairs"]
        < 0.3
        < found["5:1"]["pairs"]
    )
    assert not {"patterns"} & (found["5:1"].keys() | found["dense"].keys())
    saved = json.loads((tmp_path / "found.patterns.json").read_text())
    assert saved["fitted"]["patterns"] == saved["fitted-prefix-sinks"]["patterns"] == kept
    with pytest.raises(SystemExit, match="must hold fitted-first at 96"):
        call("fitted-first")
