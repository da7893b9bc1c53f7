"""The benchmark of conversions at tiny size: its rows, its measurements, and how it continues."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import spattention as spa
from benchmarks.conversion import choices, flex, inputs, page, train
from benchmarks.conversion.text import order
from spattention.data.token_file import write_token_file
from spattention.data.tokenizer import for_transformers, train_tokenizer
from spattention.data.tokens import TokenStream

ROOT = Path(__file__).parents[2]
PAGE = "It was a dark night. The captain said to the crew 0123456789 VAR magic numbers: "
CONTEXT, LAYERS, HEADS = 96, 3, 4


def tiny(**more):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        **more,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conversion")
    text = "\f".join(f"Chapter {k}. {PAGE * 20}" for k in range(6))
    tokenizer = for_transformers(train_tokenizer(text.split("\f"), 300), 256, 0)
    tokenizer.save_pretrained(folder / "model")
    tiny().save_pretrained(folder / "model")
    (folder / "text").mkdir()
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], "<u2")
    for name in ("train_books", "val_books", "val_long"):
        ids.tofile(folder / "text" / f"{name}.u16")
    return folder


def run(home, output, *more):
    sizes = ["--context", str(CONTEXT), "--profile-rows", "2", "--sensitivity-rows", "1"]
    sizes += ["--needles", "2", "--windows", "2", "--passkey-lengths", "96", "--trials", "1"]
    sizes += ["--batch", "2", "--micro-batch", "1", "--pairs", "0.5", "--commit", "abc"]
    command = [sys.executable, "-m", "benchmarks.conversion", "--model", str(home / "model")]
    command += ["--text", str(home / "text"), "--output", str(output), *sizes, *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_rows_are_measured_and_a_second_call_continues(home, tmp_path):
    output = tmp_path / "found.json"
    parts = ["--parts", "loss", "passkeys", "--attention", "bands"]
    done = run(home, output, "--rows", "dense", "fitted", "--tokens", "0", *parts)
    assert done.returncode == 0, done.stderr
    first = json.loads(output.read_text())["rows"]
    assert [row["row"] for row in first] == ["dense", "fitted"]
    assert first[1]["pairs"] <= 0.5 < first[0]["pairs"]
    assert all(0 < row["loss"]["books"]["mean"] < 10 for row in first)
    assert list(first[0]["passkeys"]["96"]) == ["0.1", "0.3", "0.5", "0.7", "0.9"]
    more = ["--rows", "dense", "fitted", "window-sinks", "fitted-lora", "--tokens", "0", "0.001"]
    done = run(home, output, *more, *parts)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    assert rows[:2] == first
    assert [(row["row"], row["million_tokens"]) for row in rows[2:]] == [
        ("window-sinks", 0), ("dense", 0.001), ("fitted", 0.001), ("window-sinks", 0.001),
        ("fitted-lora", 0.001),
    ]  # fmt: skip
    assert rows[3]["train"]["steps"] == round(1000 / (2 * CONTEXT))
    assert len(rows[2]["sinks"]) == LAYERS
    patterns = json.loads(output.with_suffix(".patterns.json").read_text())
    assert set(patterns) == {"fitted", "window-sinks", "fitted-lora"}
    assert len(patterns["fitted"]["patterns"]) == LAYERS
    assert set(json.loads(output.read_text())["settings"]["text"]) == {
        "train_books", "val_books", "val_long",
    }  # fmt: skip
    other = run(home, output, "--rows", "dense", "--seeds", "1", "--rate", "0.1", *parts)
    assert other.returncode != 0
    assert "must be of the same settings" in other.stderr
    assert json.loads(output.read_text())["rows"] == rows


PATTERNS = [
    spa.BandPattern.shared_local(HEADS, 256, prefix=3),
    spa.BandPattern((((0, 5), (20, 90)), (), ((0, 256),), ((7, 30),)), 256),
    spa.BandPattern.sliding_window(HEADS, 256, 9, prefix=1),
]


@pytest.mark.parametrize("with_sinks", [False, True])
def test_flex_attends_as_the_bands_do(with_sinks):
    """Whole texts, gradients, and decoding with a cache."""
    sinks = [torch.linspace(-1, 1, HEADS)] * LAYERS if with_sinks else None
    bands, other = tiny().double(), tiny().double()
    spa.hf.apply(bands, PATTERNS, sinks=sinks or False)
    flex.attend(other, PATTERNS, sinks)
    ids = torch.randint(0, 320, (2, 130), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, bands(ids).logits)
    losses = [model(ids, labels=ids).loss for model in (bands, other)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    for name, parameter in bands.named_parameters():
        torch.testing.assert_close(other.get_parameter(name).grad, parameter.grad)
    texts = [
        model.generate(ids[:, :100], max_new_tokens=8, do_sample=False, pad_token_id=0)
        for model in (bands, other)
    ]
    assert torch.equal(*texts)


class Knows:
    """A model that gives each token after an `a` (1) the logits of a certain `b` (2)."""

    device = torch.device("cpu")

    def eval(self):
        return self

    def __call__(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, 5)
        logits[..., 2] = (input_ids == 1) * 10.0
        return type("Output", (), {"logits": logits})


def test_likelihoods_are_of_the_last_tokens():
    requests = [([3, 1, 2], 1), ([3, 1, 4], 1), ([0] * 200 + [1, 2, 1, 2], 3), ([1, 2, 3], 2)]
    logs, greedy = choices.likelihoods(Knows(), requests)
    sure = float(torch.tensor([10.0, 0, 0, 0, 0]).log_softmax(0)[0])
    even = float(torch.zeros(5).log_softmax(0)[0])
    expected = [sure, sure - 10, sure + even + sure, sure + even]
    assert logs.tolist() == pytest.approx(expected, abs=1e-5)
    assert greedy.tolist() == [True, False, False, False]


def test_windows_are_used_once_before_any_repeats():
    found = order(10, 25, seed=3).tolist()
    assert sorted(found[:10]) == sorted(found[10:20]) == list(range(10))
    assert found == order(10, 25, seed=3).tolist() != order(10, 25, seed=4).tolist()


def test_the_rate_rises_and_falls_to_nothing():
    shares = [train._share(step, 100) for step in range(100)]
    assert shares[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert shares[9:] == sorted(shares[9:], reverse=True)
    assert 0 < shares[-1] < 0.01


def test_text_is_tokenized_anew(tmp_path):
    """Documents keep their text, and end with the new tokenizer's separator."""
    words = ["One whale swam. " * 40, "Two ships sailed. " * 40]
    old, new = (train_tokenizer(words, size) for size in (290, 300))
    ids = [np.array([*old.encode(text).ids, 280], np.uint16) for text in words]
    stream = TokenStream.from_documents(ids)
    write_token_file(tmp_path / "a.u16.xz", stream, 280)
    found = inputs.translate(list(inputs.documents(tmp_path / "a.u16.xz", 280)), old, new, 10**6)
    ends = np.flatnonzero(found == inputs.END)
    assert len(ends) == 2
    parts = [part[part != inputs.END] for part in np.split(found, ends + 1)]
    assert [new.decode(part.tolist()) for part in parts] == [*words, ""]
    assert len(inputs.translate([ids[0]], old, new, 7)) == 7


def result(row, tokens, seed, loss, **more):
    return {
        "row": row, "million_tokens": tokens, "seed": seed, "pairs": 0.35, "cache": 0.5,
        "loss": {"wiki": {"mean": loss}, "books": {"mean": loss + 1}}, **more,
    }  # fmt: skip


def test_tables_are_means_over_seeds_beyond_dense(tmp_path):
    rows = [
        result("dense", 0, 0, 3.0, passkeys={"1024": {"0.1": 1.0, "0.3": 0.5}}),
        result("window", 0, 0, 3.9, passkeys={"1024": {"0.1": 0.0, "0.3": 0.5}}),
        *(result("dense", 10, seed, 2.8 + seed / 10) for seed in (0, 1)),
        *(result("window", 10, seed, 2.9 + seed / 10) for seed in (0, 1)),
    ]
    for name, part in (("a", rows[:3]), ("b", rows[3:])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"settings": {}, "rows": part}))
    runs = page.read([tmp_path / "a.json", tmp_path / "b.json"])
    text = "x\n<!-- conversion: before -->\nold\n<!-- end -->\ny"
    before = page.MARK.sub(lambda found: page.fill(found, runs), text)
    assert "| window | 0.35 | 0.50 | +0.900 | +0.900 | 0.25 | - |" in before
    assert "old" not in before
    assert page.MARK.sub(lambda found: page.fill(found, runs), before) == before
    after = page.after_training(runs)
    assert "| window | +0.100 (0.071) / +0.100 (0.071) | 2 | - | - |" in after
    with pytest.raises(SystemExit, match="a table must be one of"):
        page.MARK.sub(lambda found: page.fill(found, runs), text.replace("before", "other"))


def test_losses_of_different_texts_are_not_compared(tmp_path):
    texts = [{}, {"text": {"train_books": "0123"}}]
    for name, settings in zip("ab", texts, strict=True):
        rows = [result("dense", 0, 0, 3.0)]
        (tmp_path / f"{name}.json").write_text(json.dumps({"settings": settings, "rows": rows}))
    with pytest.raises(SystemExit, match=r"of one text, \['a.json', 'b.json'\] differ"):
        page.read([tmp_path / "a.json", tmp_path / "b.json"])


def test_scores_of_ruler_need_no_losses(tmp_path):
    scores = {"single": {"mean": 0.98, "error": 0.02, "items": 50}}
    row = {"row": "dense", "million_tokens": 0.0, "seed": 0, "ruler": {"2048": scores}}
    found = {"settings": {"text": {"val_long": "ab"}}, "rows": [row]}
    (tmp_path / "a.json").write_text(json.dumps(found))
    losses = {"settings": {}, "rows": [result("dense", 0, 0, 3.0)]}
    (tmp_path / "b.json").write_text(json.dumps(losses))
    runs = page.read([tmp_path / "a.json", tmp_path / "b.json"])
    assert "| dense | 0 | 2,048 | 50 | 0.98 (0.02) |" in page.ruler(runs)
    assert "+0.000" in page.before_training(runs)
