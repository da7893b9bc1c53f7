"""Classes of heads side by side in a captured step, and one after the other elsewhere."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from spattention.serving.class_streams import ClassStreams


def test_without_streams_classes_run_in_turns() -> None:
    streams, launched = ClassStreams(3, torch.device("cpu")), list[int]()
    streams.run([lambda index=index: launched.append(index) for index in range(3)])
    assert launched == [0, 1, 2]


def test_classes_run_side_by_side(monkeypatch: Any) -> None:
    """Each class but the last on a stream of its own, from where the current stream is to where it
    goes on."""
    events: list[Any] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name, self.device = name, "cuda"

        def wait_stream(self, other: Any) -> None:
            events.append((self.name, "waits for", other.name))

    current = [Stream("main")]

    @contextmanager
    def on(stream: Any) -> Any:
        current.append(stream)
        yield
        current.pop()

    cuda = SimpleNamespace(current_stream=lambda device: current[-1], stream=on)
    monkeypatch.setattr(torch, "cuda", cuda)
    streams = ClassStreams(3, torch.device("cpu"))
    streams.sides = [Stream("a"), Stream("b")]  # type: ignore[misc]
    streams.run(
        [lambda index=index: events.append((current[-1].name, index)) for index in range(3)]
    )
    assert events == [
        ("a", "waits for", "main"),
        ("a", 0),
        ("b", "waits for", "main"),
        ("b", 1),
        ("main", 2),
        ("main", "waits for", "a"),
        ("main", "waits for", "b"),
    ]
