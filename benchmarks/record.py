"""Results of a benchmark as JSON, with all that is needed to make them again."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from spattention.files import write_atomically
from spattention.provenance import source_commit


def processor() -> str:
    """The processor's model name where Linux tells it."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write(
    output: Path,
    what: str,
    settings: dict[str, Any],
    rows: list[dict[str, Any]],
    *,
    commit: str | None = None,
    environment: dict[str, str] | None = None,
) -> None:
    """Write the rows, atomically, with machine, versions, commit, seed and command.

    Args:
        output: JSON file.
        what: was measured.
        settings: of the run.
        rows: its results.
        commit: to record where git cannot tell.
        environment: more about the machine, such as its GPU.
    """
    commit = commit or source_commit()
    result = {
        "what": what,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **(environment or {}),
        "commit": commit,
        "seed": 0,
        "command": "python " + " ".join(sys.argv),
        "settings": settings,
        "rows": rows,
    }
    write_atomically(output, json.dumps(result, indent=1) + "\n")
