"""Context parallelism of models, and ranks that disagree or die (gloo, CPU)."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import launch

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_context_parallel_trains_as_one_process(ranks):
    """Logits, losses and gradients of one step; on two ranks also the losses of 200 steps."""
    assert f"{ranks} ranks equals one" in launch(ranks, HERE / "context_parallel.py")


@pytest.mark.slow
def test_trainer_trains_as_one_process(tmp_path):
    """Transformers' Trainer around a context-parallel model, each rank with the same rows."""
    shown = launch(2, HERE / "trainers.py", tmp_path)
    assert "Trainer's losses are those of one process" in shown


def test_ranks_that_disagree_are_told():
    """Pattern, length, shards, tokens, dtype and rows, on every rank and with both values."""
    assert "every disagreement was told" in launch(2, HERE / "disagreeing.py")


def test_a_dead_rank_ends_the_others():
    """Within the timeout of the group, instead of waiting for ever."""
    assert "ended after" in launch(0, HERE / "disagreeing.py", "dying")
