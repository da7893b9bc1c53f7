"""Recall that models are trained for: what is asked, what an entry says, and the page."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.experiments import recall_page, trained_recall
from spattention.evaluation.recall import pairs

OPTIONS = trained_recall.Options(commit="abc", count=4, steps=25)


class Knows:
    """A model that finds values at distances below `reach`, and else says 0."""

    def __init__(self, reach: int) -> None:
        self.reach = reach

    def eval(self) -> None:
        pass

    def __call__(self, input_ids: torch.Tensor) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, 16)
        for row, ids in enumerate(input_ids.tolist()):
            for place, token in enumerate(ids):
                first = ids.index(token)
                if place - first - 1 < self.reach:
                    logits[row, place, ids[first + 1] if first + 1 < len(ids) else 0] = 1.0
        return SimpleNamespace(logits=logits)


def test_accuracy_is_told_by_the_distance_of_the_value() -> None:
    question = pairs(16, 4, 30)
    question.ids[question.ids == 0] = 15  # what `Knows` guesses is never right
    right, distances = trained_recall.ask(Knows(reach=6), question)
    assert right.shape == distances.shape == (30, 4)
    assert torch.equal(right, distances < 6)
    told = trained_recall.by_distance(right, distances)
    assert [part["accuracy"] for part in told] == [1.0 * (part["distance"] < 6) for part in told]
    assert sum(part["asked"] for part in told) == 120
    assert {part["distance"] for part in told} <= {1, 3, 5, 7, 9, 11, 13}


def test_labels_are_answers_and_seeds_differ() -> None:
    """Only what is asked has a label and seeds differ."""
    first, again, other = (next(iter(trained_recall.Questions(4, seed))) for seed in (0, 0, 1))
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert not torch.equal(first["input_ids"], other["input_ids"])
    labelled = first["labels"] != -100
    assert labelled.nonzero().flatten().tolist() == [9, 11, 13, 15]
    assert torch.equal(first["labels"][labelled], first["input_ids"][labelled])


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny runs."""
    folder = tmp_path_factory.mktemp("ledger")
    for name in ("dense", "exclusive with sinks"):
        entry = trained_recall.run(OPTIONS, name, 0)
        path = trained_recall.entry_path(folder, name, 0)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(entry))
    return folder


def test_the_page_shows_what_was_run(ledger: Path, tmp_path: Path) -> None:
    runs = recall_page.read(ledger)
    assert list(runs) == ["dense", "exclusive with sinks"]
    (sparse,) = runs["exclusive with sinks"]
    assert sparse["pairs"] == pytest.approx(1 / 8, abs=0.01)
    text = recall_page.section(ledger, tmp_path)
    assert f"| dense | 1.00 | {runs['dense'][0]['accuracy']['mean']:.3f} | ? | never | 1 |" in text
    assert (tmp_path / recall_page.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert recall_page.section(tmp_path / "none", tmp_path) == ""


def test_entries_of_two_experiments_are_refused(ledger: Path) -> None:
    path = trained_recall.entry_path(ledger, "dense", 1)
    content = json.loads(trained_recall.entry_path(ledger, "dense", 0).read_text())
    path.write_text(json.dumps(content | {"steps": 26}))
    with pytest.raises(ValueError, match="of one experiment"):
        recall_page.read(ledger)
    path.unlink()


def test_learned_is_where_half_of_the_loss_is_gone() -> None:
    losses = [{"step": 25, "loss": 2.0}, {"step": 50, "loss": 1.3}, {"step": 75, "loss": 0.1}]
    assert recall_page.learned({"count": 4, "loss": losses}) == 50
    assert recall_page.learned({"count": 4, "loss": losses[:1]}) is None
