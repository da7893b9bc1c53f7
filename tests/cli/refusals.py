"""What a command prints when it refuses its input: one line, and status 2."""

from __future__ import annotations

import pytest

from spattention.cli import main

Texts = pytest.CaptureFixture[str]
HUGE = str(10**40)


def refusal(arguments: list[str], capsys: Texts) -> str:
    """What a refused call prints on standard error; the exit status is 2."""
    try:
        status = main(arguments)
    except SystemExit as ended:  # of options that are not even of the right type
        status = ended.code
    told = capsys.readouterr().err
    assert status == 2, told
    assert "Traceback" not in told
    return told


def check(arguments: list[str], error: str, capsys: Texts) -> None:
    told = refusal(arguments, capsys)
    assert error in told
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert len(told) < 900
