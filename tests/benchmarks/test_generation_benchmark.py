"""The benchmark of generation at tiny size, without compiling."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from spattention import BandPattern
from spattention.cache_layout import ring_lengths

ROOT = Path(__file__).parents[2]


def test_every_way_is_measured_and_written(tmp_path: Path) -> None:
    """It measures every way and writes what it found."""
    output = tmp_path / "generation.json"
    sizes = ["--layers", "1", "--vocabulary", "300", "--context", "256", "--batch", "2"]
    command = [sys.executable, "-m", "benchmarks.generation", "--model", "olmoe-tiny", *sizes]
    command += ["--steps", "2", "--repeats", "1", "--eager", "--commit", "abc"]
    done = subprocess.run(
        [*command, "--output", str(output)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["commit"] == "abc"
    dense, kernel, bands = found["rows"]
    tokens = 256 + 2 + 32
    # One layer of eight heads of sixteen, float32, keys and values of two rows; and a counter.
    assert dense["cache_bytes"] == kernel["cache_bytes"] == 2 * 2 * 8 * tokens * 16 * 4 + 8
    rings = sum(ring_lengths(BandPattern.shared_local(8, 256), 8))
    assert bands["cache_bytes"] == 2 * 2 * (rings + 1) * 16 * 4
    assert all(row["tokens_per_second"] > 0 for row in found["rows"])
