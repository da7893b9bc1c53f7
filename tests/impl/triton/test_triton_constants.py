"""Constants on the device: made once, bounded, and retained where a CUDA graph reads them."""

from __future__ import annotations

import pytest
import torch

from spattention.impl.triton import constants
from spattention.impl.triton.constants import ConstantCache, int32_table

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a CUDA graph is being captured; the last entry is the answer."""
    answers = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: answers[-1])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return answers


def test_constants_are_made_once() -> None:
    cache = ConstantCache[torch.Tensor](max_entries=3)
    first = cache.get("a", CPU, lambda: int32_table([1, 2], CPU))
    assert cache.get("a", CPU, lambda: int32_table([3], CPU)) is first
    assert first.tolist() == [1, 2]


def test_number_of_constants_is_bounded() -> None:
    cache = ConstantCache[int](max_entries=3)
    for key in range(20):
        assert cache.get(key, CPU, lambda key=key: key) == key
        assert len(cache.entries) <= 3


def test_first_use_in_a_capture_raises(capturing: list[bool]) -> None:
    cache = ConstantCache[int](max_entries=3)
    capturing.append(True)
    with pytest.raises(RuntimeError, match="before the capture of a CUDA graph"):
        cache.get("a", GPU, lambda: 1)


def test_captured_constants_are_retained(capturing: list[bool]) -> None:
    """A graph reads their memory at every replay."""
    cache = ConstantCache[list[str]](max_entries=3)
    kept = cache.get("kept", GPU, lambda: ["kept"])
    capturing.append(True)
    assert cache.get("kept", GPU, lambda: ["other"]) is kept
    capturing.append(False)
    for key in range(20):
        cache.get(key, GPU, list)
    assert cache.get("kept", GPU, lambda: ["other"]) is kept


def test_entries_are_dropped_after_the_gpu_is_done(
    capturing: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[int] = []
    cache = ConstantCache[int](max_entries=3)
    monkeypatch.setattr(
        constants.torch.cuda, "synchronize", lambda device: waits.append(len(cache.entries))
    )
    for key in range(7):
        cache.get(key, GPU, lambda: 0)
    assert waits == [3, 3]
