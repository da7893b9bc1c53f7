"""The command line itself: help, unknown commands, errors of users, missing extras."""

import dataclasses
import importlib
import subprocess
import sys

import pytest

from spattention.cli import COMMANDS, main


def test_the_overview_names_every_command_and_imports_none(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert main([]) == 0
    code = (
        "import sys; from spattention.cli import main; main(['--help']);"
        "sys.exit(any(m in sys.modules for m in ('tyro', 'transformers', 'matplotlib', 'rich')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("name", ["compare", "draw", "generate"])
def test_each_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"spattention {name}" in text
    options = importlib.import_module(f"spattention.cli.{name}").Options
    described = " ".join(text.replace("│", " ").split())
    for field in dataclasses.fields(options):
        assert field.name.replace("_", "-") in options.__doc__.replace("_", "-")
    # The last sentence of the explanation, and the help of the last option, both arrived.
    explanation, _, arguments = options.__doc__.partition("Args:")
    assert " ".join(explanation.split())[-40:] in described
    assert arguments.split(": ")[-1].split()[0] in described


def test_an_unknown_command_suggests_one(capsys):
    assert main(["comprae"]) == 2
    assert "no command 'comprae', did you mean 'compare'?" in capsys.readouterr().err


def test_an_error_in_the_options_is_one_line(capsys, tmp_path):
    assert main(["draw", "spiral", "--output", str(tmp_path / "a.png")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: a pattern must be one of")
    assert error.count("\n") == 1
    assert main(["draw", "--output", str(tmp_path / "a.gif")]) == 2
    assert "must end with one of" in capsys.readouterr().err


def test_a_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["compare"]) == 2
    error = capsys.readouterr().err
    assert error == (
        "error: `spattention compare` needs the package 'tyro', which is not installed: "
        "pip install 'spattention[train]'\n"
    )


def test_draw_writes_the_formats_that_it_names(tmp_path, capsys):
    for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        path = tmp_path / "deep" / f"bands{suffix}"
        arguments = ["draw", "exclusive", "--heads", "4", "--span", "32", "--output", str(path)]
        assert main(arguments) == 0
        assert path.read_bytes().startswith(magic)
        assert str(path) in capsys.readouterr().out
