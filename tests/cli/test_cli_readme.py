"""The README's three commands that train a model on one's own text."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from spattention.cli import main

README = Path(__file__).parents[2] / "README.md"
SHORT = {
    "prepare": [],
    "train": ["steps=2", "evaluate_every=2", "validation_windows=2", "context=64"],
    "evaluate": ["--windows", "2", "--items", "1"],
}


@pytest.mark.slow
def test_own_text_trains_and_is_evaluated(tmp_path, monkeypatch, capsys):
    """As the README says them, shortened by options alone."""
    section = README.read_text().split("## Train")[1]
    block = re.search(r"```bash\n(.*?)```", section, re.S)
    assert block is not None
    commands = [shlex.split(line) for line in block[1].splitlines()]
    assert [command[:2] for command in commands] == [["spattention", name] for name in SHORT]
    monkeypatch.chdir(tmp_path)
    page = "It was a dark and stormy night, and the captain said: tell us a story.\n"
    lines = (json.dumps({"text": f"Chapter {k}\n{page * 20}"}) for k in range(40))
    Path("my-text.jsonl").write_text("\n".join(lines))
    for command in commands:
        assert main([*command[1:], *SHORT[command[1]]]) == 0
    assert "Validation loss" in capsys.readouterr().out
