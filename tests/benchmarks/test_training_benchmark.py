"""The benchmark of training steps, at tiny size: all sides in turns in one model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import training, training_models
from benchmarks.training_sides import Side, predict
from spattention import BandPattern
from spattention.choice import attention_choice
from spattention.models import build, preset

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from cpu_recorder import Recorder

PATTERNS = ("shared_local:local=4", "longformer:wide=4", "exclusive")


@pytest.mark.parametrize(
    ("patterns", "more"),
    [(PATTERNS, ()), ((), ()), (PATTERNS[:1], ("--graphs",))],
    ids=["all", "dense alone", "graphs"],
)
def test_all_sides_are_measured_in_one_model(
    patterns: tuple[str, ...],
    more: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "Recorder", Recorder)
    output = tmp_path / "found.json"
    command = (
        "training.py --model olmoe-tiny --layers 1 --vocabulary 64 --length 32 --tokens 64 "
        "--passes 1 --repeats 2 --no-compile --dense math --loss chunked --patterns"
    )
    monkeypatch.setattr(sys, "argv", [*command.split(), *patterns, *more, "--output", str(output)])
    training.main()
    rows = json.loads(output.read_text())["rows"]
    assert [row["attention"] for row in rows] == ["dense, PyTorch's own products", *patterns]
    assert all(len(row["all_seconds"]) == 2 and row["tokens_per_second"] > 0 for row in rows)
    assert rows[0]["over_dense"] == 1
    checked = [row["attention"] for row in rows if row["check"]]
    assert checked == [name for name in patterns if not name.startswith("longformer")]


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
        side = Side(name, attention_choice(name, heads, 32), None)
        with side.chosen(model):
            seen.append(model(tokens).logits)
        torch.testing.assert_close(model(tokens).logits, before)
        assert model.config.to_dict() == section
    torch.testing.assert_close(seen.pop(), before)
    assert [bool((other - before).abs().max() > 1e-4) for other in seen] == [True] * len(PATTERNS)


@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen3-4b"])
def test_grouped_models_are_compared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands with a prefix per key/value head agree with their dense mask; another mask does not."""
    for shape in (training_models.LLAMA_1B, training_models.QWEN3_4B):
        for key, value in {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}.items():
            monkeypatch.setitem(shape, key, value)
    torch.manual_seed(0)
    model = training_models.random_model(name, 64, 2, 96, torch.device("cpu"))
    tokens = torch.randint(96, (2, 64))
    text = "exclusive:kv_heads=8,prefix=4"
    side = Side(text, attention_choice(text, 32, 64), None)
    side.compare(model, tokens)
    assert side.check is not None
    assert side.check["gradient_difference"] < 1e-4
    mask = BandPattern.mask
    monkeypatch.setattr(
        BandPattern, "mask", lambda self, *rest, **more: mask(self, *rest, **more).flip(0)
    )
    with pytest.raises(RuntimeError, match="differs from its reference"):
        side.compare(model, tokens)


def test_predictions_are_of_kernels_alone() -> None:
    """A gain of half of what the kernels save is a share of .5."""
    sides = [
        Side(name, attention_choice("dense", 2, 8), None, kernel_seconds=seconds)
        for name, seconds in (("dense", 0.5), ("bands", 0.1))
    ]
    found = predict(*sides, {"dense": 1.0, "bands": 0.8})
    assert found == {
        "predicted_seconds": pytest.approx(0.6),
        "share_of_predicted_gain": pytest.approx(0.5),
        "share_of_predicted_speed": pytest.approx(0.75),
    }
    assert predict(sides[0], sides[0], {"dense": 1.0}) == {}
