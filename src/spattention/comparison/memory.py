"""Memory of a process: its resident set and the high-water mark of that."""

from __future__ import annotations

import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def resident_bytes() -> int | None:
    """Bytes of this process that are resident now; None where the system does not tell."""
    return _status("VmRSS") if STATUS.exists() else None


def peak_resident_bytes() -> int | None:
    """The most bytes of this process that were ever resident; None if the system does not tell."""
    if STATUS.exists():
        # Unlike `ru_maxrss`, which a forked process inherits from its parent, this one is its own.
        return _status("VmHWM")
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(name: str) -> int | None:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
