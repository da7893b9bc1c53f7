"""The command line itself: help, unknown commands, errors of users, missing extras."""

import dataclasses
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from spattention.cli import COMMANDS, EXTRAS, main
from spattention.training.recipe import Recipe, shipped_recipes


def test_the_overview_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert main([]) == 0


HEAVY = ("torch", "transformers", "matplotlib", "datasets", "accelerate")


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_imports_nothing_heavy(name):
    """PyTorch and Transformers take seconds; without them `--help` is there at once."""
    arguments = [name, "--help"] if name else ["--help"]
    code = (
        "import sys; from spattention.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        f"heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "usage: spattention" in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "tiny-gpu"], "tiny-gpu is no file, did you mean tiny-cpu?"),
        (["train", "tiny-cpu", "--set", "stepz=3"], "no field 'stepz', did you mean `steps`?"),
        (["evaluate", "runs/tiny-cp"], "there is no such folder, did you mean runs/tiny-cpu?"),
        (["generate", "runs/tiny-cp", "It was"], "did you mean runs/tiny-cpu?"),
        (["generate", "runs/tiny-cpu"], "give a prompt or --file, one of them"),
        (["prepare", "one.tx", "--output", "out"], "a file nor a folder, did you mean one.txt?"),
        (["fit", "runs/tiny-cp", "--output", "out"], "did you mean runs/tiny-cpu?"),
        (
            ["fit", "runs/tiny-cpu", "--data", "one.tx", "--output", "out"],
            "one.tx is neither a file nor a folder",
        ),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, list) else "",
)
def test_a_slip_is_told_before_anything_heavy(arguments, told, tmp_path):
    """Names that do not exist take no seconds of imports, and are not asked of the hub."""
    (tmp_path / "runs" / "tiny-cpu").mkdir(parents=True)
    (tmp_path / "one.txt").write_text("text")
    code = (
        "import sys; from spattention.cli import main\n"
        f"assert main({arguments!r}) == 2\n"
        f"heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    assert told in ended.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("draw", "[PATTERN]"),
        ("evaluate", "CHECKPOINT"),
        ("fit", "MODEL"),
        ("generate", "FOLDER [PROMPT]"),
        ("prepare", "[SOURCE]"),
        ("train", "RECIPE"),
    ],
)
def test_help_names_arguments_as_errors_do(name, words, capsys):
    """An error says that `RECIPE` is no file, so the usage has that word, and not STR."""
    with pytest.raises(SystemExit):
        main([name, "--help"])
    usage, *_ = capsys.readouterr().out.splitlines()
    assert words in usage


@pytest.mark.parametrize("name", COMMANDS)
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


def test_help_of_train_names_every_field(capsys):
    """The help of train names every field of a recipe."""
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Recipe):
        assert f"- {field.name} (" in text
    assert "- steps (required): optimizer steps." in text
    assert "- layers (optional): decoder layers, instead of the preset's; a pretrained" in text
    assert all(path.stem in text for path in shipped_recipes())
    assert '- parallel (default "ddp"): "ddp" copies the model' in text


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


def test_a_folder_that_cannot_be_made_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "text.txt").write_text("one\ftwo\fthree")
    output = str(tmp_path / "file" / "out")
    command = ["prepare", str(tmp_path / "text.txt"), "--vocabulary", "280", "--held-out", "0"]
    assert main([*command, "--output", output]) == 2
    error = capsys.readouterr().err
    assert "file" in error
    assert error.count("\n") == 1


def test_a_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["compare"]) == 2
    error = capsys.readouterr().err
    assert error == (
        "error: `spattention compare` needs the package 'tyro', which is not installed: "
        "pip install 'spattention[train]', or in a clone pip install -e '.[train]'\n"
    )


@pytest.mark.parametrize(
    "pattern",
    [
        "exclusive:widths=0",
        "exclusive:widths=3",
        "shared_local:local=1.5",
        "sliding_window:window=",
    ],
)
def test_options_of_a_pattern_never_end_in_a_traceback(pattern, capsys):
    name, option, value = pattern.replace("=", ":").split(":")
    for command in (["draw", pattern], ["compare", "--patterns", pattern]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: option `{option}` of `{name}` must be")
        assert error.endswith(f"got {value!r}\n")


def test_draw_without_heads(capsys):
    assert main(["draw", "sliding_window", "--heads", "0"]) == 2
    assert "`--heads` must be at least 1, got 0" in capsys.readouterr().err


def test_missing_triton_is_named_by_a_command(capsys, monkeypatch):
    """Triton is found missing only while a command runs."""

    def needs_triton(options):
        import triton.runtime  # noqa: F401

    monkeypatch.setattr(importlib.import_module("spattention.cli.tune"), "main", needs_triton)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert main(["tune"]) == 2
    error = capsys.readouterr().err
    assert "`spattention tune` needs the package 'triton'" in error
    assert "pip install 'spattention[gpu]'" in error


def raising(monkeypatch, error):
    def fails(options):
        raise error

    monkeypatch.setattr(importlib.import_module("spattention.cli.tune"), "main", fails)


def test_a_missing_package_of_no_extra_is_a_bug(monkeypatch, capsys):
    raising(monkeypatch, ModuleNotFoundError("No module named 'odd'", name="odd"))
    assert main(["tune"]) == 1
    assert "failed unexpectedly, with ModuleNotFoundError: No module" in capsys.readouterr().err


class Panic(BaseException):
    """Like the exception that a panic in Rust becomes."""


@pytest.mark.parametrize("error", [KeyError("x"), Panic("a\nb"), RecursionError(), MemoryError()])
def test_an_unexpected_exception_is_one_line(monkeypatch, capsys, error):
    """The line names the exception and how to see its traceback, which `--traceback` shows."""
    raising(monkeypatch, error)
    assert main(["tune"]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"`spattention tune` failed unexpectedly, with {type(error).__name__}: " in told
    assert "`spattention --traceback tune ...` shows where it happened" in told
    with pytest.raises(type(error)):
        main(["--traceback", "tune"])


def test_a_message_of_several_lines_is_told_in_one(monkeypatch, capsys):
    raising(monkeypatch, ValueError("a rule\n  and its value"))
    assert main(["tune"]) == 2
    assert capsys.readouterr().err == "error: a rule and its value\n"


def test_of_a_traceback_in_a_message_the_end_is_told(monkeypatch, capsys):
    inner = "Traceback (most recent call last):\n  File x, line 3\nOSError: no room"
    raising(monkeypatch, RuntimeError(f"dense-seed0 failed:\n{inner}"))
    assert main(["tune"]) == 1
    assert "RuntimeError: dense-seed0 failed: OSError: no room;" in capsys.readouterr().err


def test_an_interrupt_is_told(monkeypatch, capsys):
    raising(monkeypatch, KeyboardInterrupt())
    assert main(["tune"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_extras_bring_what_they_are_named_for():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    declared = project["project"]["optional-dependencies"]
    for package, extra in EXTRAS.items():
        brought = declared[extra] + (declared["hf"] if "spattention[hf]" in declared[extra] else [])
        distribution = package.replace("_", "-")
        assert any(line.startswith(f"{distribution}>=") for line in brought), package


def test_draw_writes_the_formats_that_it_names(tmp_path, capsys):
    for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        path = tmp_path / "deep" / f"bands{suffix}"
        arguments = ["draw", "exclusive", "--heads", "4", "--span", "32", "--output", str(path)]
        assert main(arguments) == 0
        assert path.read_bytes().startswith(magic)
        share = "25.0 % of dense attention's pairs"
        assert f"{path}: {share}" in capsys.readouterr().out


def test_draw_warns_of_a_pattern_that_is_dense(tmp_path, capsys):
    path = tmp_path / "a.svg"
    command = ["draw", "shared_local:local=99", "--heads", "2", "--span", "32"]
    assert main([*command, "--output", str(path)]) == 0
    told = capsys.readouterr().err
    assert told == (
        "warning: every head of shared_local attends all distances: this is dense attention\n"
    )
    assert path.exists()


def test_draw_leaves_the_old_picture_when_it_fails(tmp_path, monkeypatch, capsys):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.png"
    path.write_text("old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert main(["draw", "--heads", "2", "--span", "32", "--output", str(path)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("command", "inside"),
    [
        (["draw"], "matplotlib.figure.Figure.savefig"),
        (["prepare", "text.txt"], "spattention.data.corpus.train_tokenizer"),
        (["prepare", "text.txt"], "spattention.data.corpus.end_of_text_id"),
        (["compare", "--data", "text.txt", "--context", "8"], "spattention.data.prepare.tokenize"),
    ],
)
def test_an_interrupt_leaves_nothing_half_written(command, inside, tmp_path, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("\f".join(f"words of document {k}" for k in range(120)))
    monkeypatch.setattr(inside, interrupted)
    output = "out.png" if command == ["draw"] else "out"
    assert main([*command, "--output", output]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_closed_reader_is_no_error():
    """`spattention --help | head -1` prints a line, and no error."""
    code = (
        "import os, sys; from spattention.cli import main\n"
        "read, write = os.pipe(); os.close(read); os.dup2(write, 1)\n"
        "sys.exit(main(['--help']))"
    )
    ended = subprocess.run([sys.executable, "-u", "-c", code], stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (141, "")
