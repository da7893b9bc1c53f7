"""`benchmarks/prefill.py` on a few tokens: what it writes, and that it checks before it times."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "prefill.py"
NAMES = ["dense", "exclusive", "cca:group=4,window=8", "rrattention:block=16,tau=0.5"]


def test_it_writes_a_row_for_each_name(tmp_path, monkeypatch, capsys):
    output = tmp_path / "prefill.json"
    sizes = ["--random", "4", "2", "8", "--lengths", "160", "--names", *NAMES]
    monkeypatch.setattr(sys, "argv", ["prefill.py", *sizes, "--output", str(output)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = json.loads(output.read_text())["rows"]
    assert [row["attention"] for row in rows] == NAMES
    assert all(row["milliseconds"] > 0 for row in rows)
    assert 0.3 < rows[-1]["captured"] <= 1
    assert 0.1 < rows[-1]["blocks"] < 1


def test_a_wrong_result_is_not_timed():
    found = runpy.run_path(str(SCRIPT))
    tensors = found["random_inputs"]((4, 2, 8), 64, torch.device("cpu"))["random"]
    _, part = found["prepared"]("exclusive", 4, 64)
    with pytest.raises(ValueError, match="the last rows must be within"):
        found["check"](torch.zeros(1, 4, 64, 8), tensors, 0.35, part)


def test_queries_and_keys_are_those_of_the_model():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads)).eval()
    found = runpy.run_path(str(SCRIPT))["model_inputs"](model, torch.arange(9)[None], [0, 2])
    assert list(found) == ["layer 0", "layer 2"]
    query, key, value = found["layer 2"]
    assert (query.shape, key.shape, value.shape) == ((1, 4, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8))
