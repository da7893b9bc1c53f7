"""Classes of heads side by side, where there are no streams."""

from __future__ import annotations

import torch

from spattention.serving.class_streams import ClassStreams


def test_without_streams_classes_run_in_turns() -> None:
    streams = ClassStreams(3, torch.device("cpu"))
    query = torch.zeros(2)
    for index in range(3):
        with streams.run(index, query) as read:
            assert read is query
    assert not streams.copies
