"""Provenance of a measurement: commit of this package, versions of libraries, machine."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from . import __version__


def source_commit() -> str | None:
    """The git commit of the checkout that this package runs from; None where it is installed."""
    return _git("rev-parse", "HEAD") if _is_checkout() else None


def source_version() -> str | None:
    """The commit in twelve digits, `-dirty` behind it where files differ; None if installed."""
    return _git("describe", "--always", "--dirty", "--abbrev=12") if _is_checkout() else None


def _is_checkout() -> bool:
    # An environment inside somebody's checkout is not this project's.
    return _git("ls-files", "--error-unmatch", Path(__file__).name) is not None


def _git(*command: str) -> str | None:
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *command],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def versions(libraries: Sequence[str]) -> dict[str, str]:
    """Versions of Python, this package and the libraries named."""
    found = {"python": platform.python_version(), "spattention": __version__}
    return found | {name: version(name) for name in libraries}


def spattention_command() -> str:
    """The command of this process, as it was typed."""
    return shlex.join(["spattention", *sys.argv[1:]])


def machine() -> dict[str, Any]:
    """The machine that a measurement is made on."""
    return {
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "processor": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
