"""Answers of a model with bands, layer by layer dense, at tiny size."""

from __future__ import annotations

import json

import numpy as np
import torch
import tyro
from transformers import LlamaConfig, LlamaForCausalLM

import spattention as spa
from benchmarks.conversion.layers import Options, main
from spattention.data.tokenizer import for_transformers, train_tokenizer

PAGE = "It was a dark night. The captain said to the crew 0123456789: "


def test_answers_are_asked_by_dense_layer(tmp_path):
    """Rows within the budget, then layers opened beyond it."""
    torch.manual_seed(0)
    tokenizer = for_transformers(train_tokenizer([PAGE * 20], 300), 256, 0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            max_position_embeddings=256,
        )
    ).eval()
    ids = tokenizer(PAGE * 40, add_special_tokens=False)["input_ids"]
    for folder in (model, tokenizer):
        folder.save_pretrained(tmp_path / "model")
    (tmp_path / "text").mkdir()
    for name in ("train_books", "val_books", "val_long"):
        np.array(ids, "<u2").tofile(tmp_path / "text" / f"{name}.u16")
    rows = [torch.tensor(ids[:96])]
    spa.hf.profile(model, rows, sensitivity=1, progress=False).save(tmp_path / "profile.json")
    output = tmp_path / "found.json"
    given = ["--model", tmp_path / "model", "--text", tmp_path / "text", "--output", output]
    given += ["--profile", tmp_path / "profile.json", "--pairs", "0.8", "--context", "96"]
    given += ["--lengths", "96", "--trials", "2", "--refitted", "0", "--commit", "abc"]
    main(tyro.cli(Options, args=[str(each) for each in given]))
    found = json.loads(output.read_text())["rows"]
    assert [row["row"] for row in found] == ["dense", "fitted", "dense 0", "opened 0", "opened 1"]
    assert all(row["pairs"] <= 0.8 for row in found[1:3])
    assert all(set(row["answers"]) == {"96 at 0.1", "96 at 0.3"} for row in found)
    means = {row["row"]: row["answers"]["96 at 0.1"]["mean"] for row in found}
    assert len(set(means.values())) > 3
    assert all(mean < 0 for mean in means.values())
