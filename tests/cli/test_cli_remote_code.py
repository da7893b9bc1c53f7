"""Code that comes with a model is never run, and nobody is asked whether to run it."""

from __future__ import annotations

import json
import os
import select
import sys
import time
from pathlib import Path

import pytest
from saved_model import PROMPT, edit, save

from spattention.cli import main

RECIPE = """
model = "MODEL"
data = ["gone"]
context = 64
steps = 1
batch = 1
learning_rate = 1e-3
precision = "float32"
loss = "plain"
"""


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder with code in every place where Transformers looks for some; it leaves a mark."""
    folder = save(tmp_path / "model")
    code = f"open({str(tmp_path / 'mark')!r}, 'w').write('run')\nraise SystemExit\n"
    (folder / "evil.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoModel")
    edit(folder / "config.json", auto_map=dict.fromkeys(names, "evil.M"))
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.T", "evil.T"]},
        tokenizer_class="PreTrainedTokenizerFast",
    )
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions that a user at a terminal would be asked, who says yes to all."""
    questions: list[str] = []

    def say_yes(question: str = "") -> str:
        questions.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", say_yes)
    return questions


def commands(folder: Path) -> list[list[str]]:
    recipe = folder.parent / "recipe.toml"
    recipe.write_text(RECIPE.replace("MODEL", str(folder)))
    output = ["--output", str(folder.parent / "out")]
    return [
        ["generate", str(folder), PROMPT],
        ["evaluate", str(folder), *output],
        ["train", str(recipe), *output],
    ]


def test_a_model_type_of_its_own_is_refused(
    foreign: Path, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    edit(foreign / "config.json", model_type="evil")
    for command in commands(foreign):
        assert main(command) == 2
        told = capsys.readouterr().err
        assert "config.json must have a `model_type` that Transformers knows, got 'evil'" in told
        assert "a folder's own code is never run" in told
    assert not asked
    assert not (foreign.parent / "mark").exists()


def test_a_known_model_type_runs_without_its_code(
    foreign: Path, asked: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(foreign), PROMPT, "--max-new-tokens", "2"]) == 0
    assert "2 tokens after a prompt of" in capfd.readouterr().err
    assert not asked
    assert not (foreign.parent / "mark").exists()


def test_a_tokenizer_of_its_own_is_refused(
    foreign: Path, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    edit(foreign / "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    (foreign / "tokenizer.json").unlink()
    assert main(["generate", str(foreign), PROMPT]) == 2
    assert "tokenizer_config.json must name a tokenizer of Transformers" in capsys.readouterr().err
    assert not asked
    assert not (foreign.parent / "mark").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_at_a_terminal_nobody_is_asked(foreign: Path) -> None:
    """As a user sees it: a terminal, into which somebody types yes all the time."""
    import pty

    edit(foreign / "config.json", model_type="evil")
    code = "import sys; from spattention.cli import main; sys.exit(main())"
    process, terminal = pty.fork()
    if process == 0:
        command = [sys.executable, "-c", code, "generate", str(foreign), "Once"]
        os.execve(sys.executable, command, {**os.environ, "HF_HUB_OFFLINE": "1"})
    shown, until = b"", time.monotonic() + 120
    os.write(terminal, b"y\ny\n")
    while time.monotonic() < until:
        if select.select([terminal], [], [], 1)[0]:
            try:
                part = os.read(terminal, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown += part
    _, status = os.waitpid(process, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 2
    assert b"[y/N]" not in shown
    assert b"a folder's own code is never run" in b" ".join(shown.split())
    assert not (foreign.parent / "mark").exists()


def test_attention_from_the_hub_is_refused(
    foreign: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel that a config names by repository is code as well."""
    config = json.loads((foreign / "config.json").read_text())
    del config["spattention"]
    for name in ("someone/kernel", {"text_config": "someone/kernel"}):
        content = json.dumps(config | {"attn_implementation": name})
        (foreign / "config.json").write_text(content)
        for command in commands(foreign):
            assert main(command) == 2
            assert "code from the hub is never run" in capsys.readouterr().err
