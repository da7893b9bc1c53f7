"""What the interpreter cannot tell: that the kernels compile, and fit a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_the_decoding_kernels_compile_for_hopper(tmp_path: Path) -> None:
    script = Path(__file__).with_name("compile_decode.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [[int(number) for number in line.split()] for line in done.stdout.splitlines()]
    assert len(found) == 14
    assert all(shared <= limit for shared, limit in found), found
