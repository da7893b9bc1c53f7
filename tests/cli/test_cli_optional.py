"""Options that may be left out."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import tyro

from spattention.cli import COMMANDS, main
from spattention.cli.optional import OPTIONS
from spattention.cli.options.compare import Options as Compare
from spattention.cli.options.generate import Options as Generate


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_types_alone(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module(f"spattention.cli.options.{command}")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "{None" not in capsys.readouterr().out


def test_the_word_none_is_a_text_where_texts_are() -> None:
    def read(options: type, *words: str) -> object:
        return tyro.cli(options, args=list(words), registry=OPTIONS)

    assert read(Compare) == Compare()
    assert read(Compare, "--layers", "None") == Compare(layers=None)
    assert read(Compare, "--layers", "3", "--data", "None") == Compare(layers=3, data=Path("None"))
    assert read(Generate, "m", "None") == Generate(Path("m"), "None")


def test_a_choice_is_not_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "m", "text", "--compare", "dens"])
    assert "None" not in capsys.readouterr().err
