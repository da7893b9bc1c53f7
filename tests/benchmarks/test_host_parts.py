"""The parts of a call's host time: launches are recorded and run, floors are their sums."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import triton

from benchmarks import host_parts
from spattention.compat.triton import BoundLaunch, DirectLaunch


def test_launches_are_recorded_and_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver got can be launched again, and later launches are no longer recorded."""
    driver = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 7)
    monkeypatch.setattr(type(triton.runtime.driver), "active", driver)
    launched: list[Any] = []
    kernel = SimpleNamespace(function="function", packed_metadata=())
    launch = DirectLaunch(kernel, lambda *given: launched.append(given), lambda *_: (), ())
    with host_parts.launches() as found:
        launch(3, "argument")
    launch(5)
    assert [given[0] for given in launched] == [3, 5]
    host_parts._launch(found)
    assert launched[2] == launched[0]
    assert len(found) == 1


def test_repeated_launches_are_recorded_too() -> None:
    launched: list[Any] = []
    launch = BoundLaunch.__new__(BoundLaunch)
    launch.launch = lambda *given: launched.append(given)
    launch.programs, launch.between, launch.nested = 3, ["function"], False
    launch.given, launch.pointers = [None, "argument"], [(0, 1)]
    launch.tuples, launch.descriptors = [], []
    with host_parts.launches() as found:
        launch(7, [16, 32])
    host_parts._launch(found)
    assert launched == [(3, 1, 1, 7, "function", 32, "argument")] * 2


def test_a_floor_leaves_out_what_python_takes() -> None:
    row = {"forward, dense": 20.0, "backward, dense": 100.0}
    for way in ("forward", "backward"):
        row |= {f"{way}, autograd": 10.0, f"{way}, memory": 5.0, f"{way}, launches": 15.0}
    assert host_parts.floors(row) == {
        "forward, floor": 30.0,
        "forward, floor over dense": 1.5,
        "backward, floor": 30.0,
        "backward, floor over dense": 0.3,
    }
