"""Constants on the device: made once, bounded, and retained where a CUDA graph reads them."""

from __future__ import annotations

import pytest
import torch

from spattention.impl.triton.constants import ConstantCache, int32_table, is_capturing

CPU, GPU, OTHER = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


class Driver:
    """Answers for CUDA: whether a graph is captured; the devices that were waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing = False
        self.waits: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "synchronize", self.waits.append)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


def test_constants_are_made_once() -> None:
    cache = ConstantCache[torch.Tensor](max_entries=3)
    first = cache.get("a", CPU, lambda: int32_table([1, 2], CPU))
    assert cache.get("a", CPU, lambda: int32_table([3], CPU)) is first
    assert first.tolist() == [1, 2]


@pytest.mark.usefixtures("driver")
def test_devices_have_their_own_constants() -> None:
    cache = ConstantCache[str](max_entries=3)
    assert cache.get("a", GPU, lambda: "first") == "first"
    assert cache.get("a", OTHER, lambda: "second") == "second"


def test_number_of_constants_is_bounded() -> None:
    cache = ConstantCache[int](max_entries=3)
    for key in range(20):
        assert cache.get(key, CPU, lambda key=key: key) == key
        assert len(cache.entries[CPU]) <= 3


def test_first_use_in_a_capture_raises(driver: Driver) -> None:
    cache = ConstantCache[int](max_entries=3)
    driver.capturing = True
    with pytest.raises(RuntimeError, match="before the capture of a CUDA graph"):
        cache.get("a", GPU, lambda: 1)


def test_captured_constants_are_retained(driver: Driver) -> None:
    """A graph reads their memory at every replay."""
    cache = ConstantCache[list[str]](max_entries=3)
    kept = cache.get("kept", GPU, lambda: ["kept"])
    driver.capturing = True
    assert cache.get("kept", GPU, lambda: ["other"]) is kept
    driver.capturing = False
    for key in range(20):
        cache.get(key, GPU, list)
    assert cache.get("kept", GPU, lambda: ["other"]) is kept


def test_entries_are_dropped_when_the_gpu_is_done(driver: Driver) -> None:
    cache = ConstantCache[int](max_entries=3)
    cache.get("kept", GPU, lambda: 0)
    for key in range(7):
        cache.get(key, OTHER, lambda: 0)
    assert driver.waits == [OTHER, OTHER]
    assert list(cache.entries[GPU]) == ["kept"]


def test_capture_is_asked_of_the_driver(driver: Driver) -> None:
    driver.capturing = True
    assert is_capturing(GPU)
    assert not is_capturing(CPU)
