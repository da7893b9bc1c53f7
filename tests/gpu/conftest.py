"""Tests that need a CUDA device: `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _give_memory_back() -> Iterator[None]:
    """Leave freed memory to the other processes of the suite: PyTorch keeps it for its own."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _documents_of_small_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are searched for documents in calls of any size: those here are small."""
    planning = pytest.importorskip("spattention.impl.triton.hopper.planning")
    monkeypatch.setattr(planning, "MIN_ROW_QUERIES", 0)
