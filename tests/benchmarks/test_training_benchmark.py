"""The benchmark of training steps, at tiny size: all sides in turns in one model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import training
from spattention.choice import attention_choice
from spattention.models import build, preset

PATTERNS = ("shared_local:local=4", "longformer:wide=4", "exclusive")


@pytest.mark.parametrize("patterns", [PATTERNS, ()], ids=["all", "dense alone"])
def test_all_sides_are_measured_in_one_model(
    patterns: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "found.json"
    command = (
        "training.py --model olmoe-tiny --layers 1 --vocabulary 64 --length 32 --tokens 64 "
        "--passes 1 --repeats 2 --no-compile --dense math --loss chunked --patterns"
    )
    monkeypatch.setattr(sys, "argv", [*command.split(), *patterns, "--output", str(output)])
    training.main()
    rows = json.loads(output.read_text())["rows"]
    assert [row["attention"] for row in rows] == ["dense, PyTorch's own products", *patterns]
    assert all(len(row["all_seconds"]) == 2 and row["tokens_per_second"] > 0 for row in rows)
    assert rows[0]["over_dense"] == 1


def test_a_side_leaves_the_model_as_it_was() -> None:
    """A side attends its own way and leaves the model as it was."""
    chosen = preset("olmoe-tiny", vocab_size=64, context=32, num_layers=1)
    torch.manual_seed(0)
    model = build(chosen, pattern=None).eval()
    tokens = torch.randint(64, (1, 32))
    heads = chosen.pattern.num_heads
    before, section = model(tokens).logits, model.config.to_dict()
    seen = []
    for name in (*PATTERNS, "dense"):
        side = training.Side(name, attention_choice(name, heads, 32), None, [])
        with side.chosen(model):
            seen.append(model(tokens).logits)
        torch.testing.assert_close(model(tokens).logits, before)
        assert model.config.to_dict() == section
    torch.testing.assert_close(seen.pop(), before)
    assert [bool((other - before).abs().max() > 1e-4) for other in seen] == [True] * len(PATTERNS)
