"""mypy passes over the package, the benchmarks and the examples."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHECKED = ("src/spattention", "benchmarks", "examples")


def check_types(folder: Path) -> subprocess.CompletedProcess[str]:
    """mypy by the settings of the folder's pyproject.toml."""
    return subprocess.run(
        [sys.executable, "-m", "mypy"], cwd=folder, capture_output=True, text=True
    )


def test_all_types_fit():
    """Benchmarks need GPUs, so that nothing else checks most of their calls here."""
    found = check_types(ROOT)
    assert found.returncode == 0, found.stdout + found.stderr


def test_a_planted_wrong_type_is_found(tmp_path):
    """A wrong type in any of the three folders fails, below a folder of theirs too."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for folder in CHECKED:
        below = tmp_path / folder / "below"
        below.mkdir(parents=True)
        (below.parent / "__init__.py").touch()
        (below / "__init__.py").touch()
        (below / "planted.py").write_text("def length(text: str) -> int:\n    return text\n")
    found = check_types(tmp_path)
    assert found.returncode == 1
    for folder in CHECKED:
        assert f"{folder}/below/planted.py:2: error" in found.stdout
