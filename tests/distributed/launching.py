"""Start a script on several processes, as users do."""

from __future__ import annotations

import os
import subprocess
import sys


def launch(processes: int, *command: object, timeout: float = 200, fails: bool = False) -> str:
    """Output of a script under torchrun, or without it for 0 processes; it must end well, unless
    `fails`."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    found = subprocess.run(
        [sys.executable, *(torchrun if processes else []), *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert (found.returncode != 0) is fails, (found.stdout + found.stderr)[-4000:]
    return found.stdout + found.stderr
