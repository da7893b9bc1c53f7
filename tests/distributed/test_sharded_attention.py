"""Attention on shards of a sequence equals attention over the whole (gloo, CPU, float64)."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import launch

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shards_equal_the_whole(ranks):
    """Every named pattern, grouped heads, packed documents, sinks, odd lengths, empty shards."""
    assert f"cases equal on {ranks} ranks" in launch(ranks, HERE / "exact.py")
