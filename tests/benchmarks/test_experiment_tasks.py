"""Tasks on the models of experiments: what is entered, what is not made again, what is shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.experiments import tasks, tasks_page
from benchmarks.experiments.ledger import read_entry

PLAN = """
title = "tiny"
seeds = [0, 1]
[recipe]
model = "olmoe-tiny"
data = ["train.u16.xz"]
validation = ["held.u16.xz"]
context = 32
steps = 1
batch = 1
learning_rate = 1e-3
[[run]]
attention = "dense"
"""
COPA = {
    "premise": "It rained.", "choice1": "The street got wet.", "choice2": "The sun set.",
    "question": "effect", "idx": 0, "label": 0,
}  # fmt: skip
LAMBADA = {"id": 0, "query": "he opened the", "answers_text": ["door"], "choices": ["door"]}


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tasks.Options:
    """Of a plan of two runs, of which the first one has a model."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny.toml").write_text(PLAN)
    for name, item in (("copa_val", COPA), ("lambada_openai_test", LAMBADA)):
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(item)}\n" * 3)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: k for k, letter in enumerate([*letters, tasks.END_OF_TEXT])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "work" / "tiny" / "dense-seed0" / "model")
    return tasks.Options(
        (tmp_path / "tiny.toml",), items=tmp_path, tokenizer=tmp_path / "tokenizer.json",
        tasks=("copa",), work=tmp_path / "work", ledger=tmp_path / "ledger", batch=2, commit="abc",
    )  # fmt: skip


def test_only_missing_scores_are_made(options, monkeypatch, capsys):
    """Scores are entered and only what is missing is made."""
    pytest.importorskip("lm_eval", reason="the harness is an extra, spattention[eval]")
    assert not tasks.main(options)
    assert "tiny/dense-seed1" in capsys.readouterr().out
    path = options.ledger / "tiny" / "tasks" / "dense-seed0.json"
    first = read_entry(path, tasks.FORMAT)
    assert [(s["task"], s["shots"], s["value"]["items"]) for s in first["scores"]] == [
        ("copa", 0, 3)
    ]
    assert (first["label"], first["seed"], first["commit"]) == ("dense", 0, "abc")
    assert not (options.ledger / "tiny" / "tasks" / "dense-seed1.json").exists()

    made = []
    real = tasks.run_tasks

    def counted(model, tokenizer, names, **rest):
        made.extend(names)
        return real(model, tokenizer, names, **rest)

    monkeypatch.setattr(tasks, "run_tasks", counted)
    more = replace(options, tasks=("copa", "lambada_openai"), only=("dense-seed0",))
    assert tasks.main(more)
    assert made == ["lambada_openai"]
    both = read_entry(path, tasks.FORMAT)
    assert both["scores"][:1] == first["scores"]
    assert {(s["task"], s["metric"]) for s in both["scores"][1:]} == {
        ("lambada_openai", "acc"),
        ("lambada_openai", "perplexity"),
    }
    assert tasks.main(more)
    assert made == ["lambada_openai"]
    assert set(both["versions"]) == {"python", "torch", "transformers", "lm_eval", "datasets"}
    with pytest.raises(ValueError, match="`--only` must name runs of the plans"):
        tasks.main(replace(more, only=("dense-seed7",)))
    with pytest.raises(ValueError, match=r"`limit` must be that of .*None, got 1"):
        tasks.main(replace(more, limit=1))


def entry(label, seed, accuracy, near=False, limit=None):
    score = {
        "task": "copa", "metric": "acc", "shots": 0, "chance": 0.5, "near_chance": near,
        "value": {"mean": accuracy, "error": 0.05, "items": 100},
    }  # fmt: skip
    return {
        "format": tasks.FORMAT, "version": 1, "label": label, "seed": seed, "limit": limit,
        "scores": [score],
    }  # fmt: skip


def written(ledger, *entries):
    folder = ledger / "tiny" / "tasks"
    folder.mkdir(parents=True)
    for each in entries:
        (folder / f"{each['label']}-seed{each['seed']}.json").write_text(json.dumps(each))


def test_the_page_marks_what_is_near_chance(tmp_path):
    """The page has means over seeds and marks what is near chance."""
    written(
        tmp_path,
        entry("dense", 0, 0.60),
        entry("dense", 1, 0.56, near=True),
        entry("exclusive", 0, 0.52, near=True),
    )
    lines = tasks_page.section(tmp_path, "tiny", ["exclusive", "gapped", "dense"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    at = rows[0].index("COPA")
    assert [(row[0], row[at], row[-1]) for row in rows[2:]] == [
        ("exclusive", "~ 52.0 ± 5.0", "1"),
        ("dense", "58.0 ± 5.0, 2.8", "2"),
        ("*chance*", "50.0", ""),
    ]
    assert all(len(row) == len(rows[0]) for row in rows)
    assert tasks_page.section(tmp_path / "none", "tiny", ["dense"]) == []


def test_a_first_look_is_not_shown(tmp_path):
    written(tmp_path, entry("dense", 0, 0.60, limit=10))
    with pytest.raises(ValueError, match="must be of all items, got limit 10"):
        tasks_page.section(tmp_path, "tiny", ["dense"])
