"""Host times are medians over turns, each in the process of its own source tree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import host_time


def row(bands: float) -> dict[str, Any]:
    return {
        "B, H, N": [1, 8, 4096],
        "what": "backward",
        "bands_us": bands,
        "dense_us": 10.0,
        "ratio": bands / 10.0,
    }


def test_rows_are_medians_of_a_side(capsys: pytest.CaptureFixture[str]) -> None:
    turns = {"old": [[row(30.0)], [row(50.0)], [row(90.0)]], "new": [[row(11.0)]]}
    rows = host_time.joined(turns)
    assert [(each["side"], each["bands_us"], each["ratio"]) for each in rows] == [
        ("old", 50.0, 5.0),
        ("new", 11.0, 1.1),
    ]
    host_time.show(rows)
    assert "ratio  1.10, limit 1.25" in capsys.readouterr().out.splitlines()[1]


def test_another_source_tree_is_refused(tmp_path: Path) -> None:
    """The process of a side says which tree it imported."""
    (tmp_path / "sitecustomize.py").write_text(
        'import os\nprint(\'{"source": "/elsewhere", "rows": []}\', flush=True)\nos._exit(0)\n'
    )
    with pytest.raises(RuntimeError, match="imported spattention from /elsewhere"):
        host_time.run_side(str(tmp_path), 1)
