"""Run a command of the README as it stands there, so that the prose is tested.

python tests/readme.py compare    the main job, with the options below added to make it short
python tests/readme.py tests      the tests
"""

import re
import subprocess
import sys
from pathlib import Path

SHORT = "--steps 4 --context 128 --patterns dense shared_local --output runs/readme"
MARKERS = {"compare": "spattention compare", "tests": "pytest"}


def command(name: str) -> str:
    """The one fenced line of the README that ends with the marker."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    lines = [
        line
        for block in re.findall(r"```bash\n(.*?)```", readme, re.S)
        for line in block.splitlines()
    ]
    found = [line for line in lines if line.endswith(MARKERS[name]) and "venv" in line]
    if len(found) != 1:
        raise ValueError(f"the README must have one set-up line for {name!r}, got {found}")
    return found[0]


if __name__ == "__main__":
    line = command(sys.argv[1]) + (f" {SHORT}" if sys.argv[1] == "compare" else "")
    print("+", line, flush=True)
    sys.exit(subprocess.run(["bash", "-c", f"set -e; {line}"]).returncode)
