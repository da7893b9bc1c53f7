"""A run that is killed at random, again and again, ends as if it had not been; see `kills.py`."""

import random
import sys
import time
from pathlib import Path

import pytest

from spattention.training.pretrain import pretrain

sys.path.insert(0, str(Path(__file__).parent))
from kills import CHANGES, KINDS, assert_same_run, kill_again_and_again
from small_run import recipe, write_data


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_a_run_survives_kills_at_random(tmp_path, seed):
    """One kill of each kind: at a random time, in a checkpoint, in a line of metrics, in the
    record. The losses, weights and optimizer are the uninterrupted run's to the last bit.
    """
    data = write_data(tmp_path)
    began = time.monotonic()
    assert pretrain(recipe(data, **CHANGES), tmp_path / "whole").finished
    seconds = time.monotonic() - began
    chance = random.Random(seed)
    killed = kill_again_and_again(data, tmp_path / "run", list(KINDS), chance, seconds)
    assert len(killed) == len(KINDS)
    assert pretrain(recipe(data, **CHANGES), tmp_path / "run").finished
    assert_same_run(tmp_path / "run", tmp_path / "whole")
