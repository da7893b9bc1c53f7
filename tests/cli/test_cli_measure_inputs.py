"""Bad inputs of `bench` and `tune`: named before a GPU is asked for, which here is none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from refusals import HUGE, Texts, check, refusal

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--cases", "4x16"], "`--cases` must be batch x heads x length, as in 4x16x4096, got '4x"),
        (["--cases", "4x16x-1"], "`--cases` must be batch x heads x length"),
        (["--cases", "x" * 9999], "`--cases` must be batch x heads x length"),
        (["--cases", "0x8x64"], "`--cases` must be from 1 to 65,535, got 0"),
        (["--cases", "1x0x64"], "`--cases` must be from 1 to 65,535, got 0"),
        (["--cases", "1x8x0"], "`--cases` must be from 1 to 536,870,912, got 0"),
        (
            ["--cases", "9999x9999x99999999"],
            "`--cases` must give batch x heads x length x he",
        ),
        (["--lengths", "0"], "`--lengths` must be from 1 to 536,870,912, got 0"),
        (["--lengths", "64", "64"], "`--lengths` must name each once, got 64 64"),
        (["--cases", "--lengths"], "`--cases` or `--lengths` must name at least one, got none"),
        (["--head-dim", "0"], "`--head-dim` must be at least 1, got 0"),
        (["--head-dim", HUGE], "`--head-dim` must be at most 256, got"),
        (["--seed", "-1"], "`--seed` must be at least 0, got -1"),
        (["--commit", "a b"], "`--commit` must be one word of 1 to 100 characters, got 'a b'"),
        (["--output", "{file}"], "`--output` must be a folder, {file} is a file"),
        (["--output", "{file}/in"], "{file}/in"),
    ],
)
def test_bench_attention_refuses_by_name(
    arguments: list[str], error: str, tmp_path: Path, capsys: Texts
) -> None:
    _check(["bench", "attention"], arguments, error, tmp_path, capsys)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--lengths"], "`--lengths` must name at least one, got none"),
        (["--lengths", "0"], "`--lengths` must be from 1 to 536,870,912, got 0"),
        (["--lengths", "4", "--queries", "8"], "`--lengths` must be from 8 to 536,870,912, got 4"),
        (["--batches"], "`--batches` must name at least one, got none"),
        (["--batches", "1", "-1"], "`--batches` must be from 1 to 65,535, got -1"),
        (["--batches", "65535", "--lengths", "9999999"], "`--lengths` must give batch x heads x"),
        (["--heads", "0"], "`--heads` must be at least 1, got 0"),
        (["--heads", HUGE], "`--heads` must be at most 65,535, got"),
        (["--key-heads", "3"], "`--key-heads` must divide `--heads` = 16, got 3"),
        (["--key-heads", "0"], "`--key-heads` must be at least 1, got 0"),
        (["--queries", "17"], "`--queries` must be at most 16, got 17"),
        (["--head-dim", "257"], "`--head-dim` must be at most 256, got 257"),
        (["--seed", HUGE], "`--seed` must be at most 4,294,967,295, got"),
        (["--commit", ""], "`--commit` must be one word of 1 to 100 characters, got ''"),
        (["--output", "{file}"], "`--output` must be a folder, {file} is a file"),
    ],
)
def test_bench_decode_refuses_by_name(
    arguments: list[str], error: str, tmp_path: Path, capsys: Texts
) -> None:
    _check(["bench", "decode"], arguments, error, tmp_path, capsys)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--head-dim", "0"], "`--head-dim` must be at least 1, got 0"),
        (["--head-dim", HUGE], "`--head-dim` must be at most 256, got"),
        (["--batch", "0"], "`--batch` must be at least 1, got 0"),
        (["--heads", "-4"], "`--heads` must be at least 1, got -4"),
        (["--length", HUGE], "`--length` must be at most 536,870,912, got"),
        (["--batch", "60000", "--length", "99999999"], "`--length` must give batch x heads x len"),
        (["--blocks", "48"], "`--blocks` must be powers of two, got 48"),
        (["--blocks"], "`--blocks` must name at least one, got none"),
        (["--blocks", "8"], "`--blocks` must be from 16 to 256, got 8"),
        (["--warps", "3"], "`--warps` must be powers of two, got 3"),
        (["--warps", "64"], "`--warps` must be from 1 to 32, got 64"),
        (["--stages", "0"], "`--stages` must be from 1 to 16, got 0"),
        (["--stages", "2", "2"], "`--stages` must name each once, got 2 2"),
        (["--best", "0"], "`--best` must be at least 1, got 0"),
        (
            ["--kernels", "portable", "--passes", "backward"],
            "`--passes` of the portable kernels must be of forward, query_gradient, key_gradient, "
            "got backward",
        ),
        (
            ["--kernels", "hopper", "--blocks", "32"],
            "`--blocks` and `--warps` must fit a launch of forward, got (32,) with (4, 8)",
        ),
    ],
)
def test_tune_refuses_by_name(
    arguments: list[str], error: str, tmp_path: Path, capsys: Texts
) -> None:
    _check(["tune"], arguments, error, tmp_path, capsys)


def _check(
    command: list[str], arguments: list[str], error: str, folder: Path, capsys: Texts
) -> None:
    file = folder / "file"
    file.write_text("text")
    given = [text.format(file=file) for text in arguments]
    check([*command, *given], error.format(file=file), capsys)
    assert list(folder.iterdir()) == [file]


@pytest.mark.parametrize("command", [["bench", "attention"], ["bench", "decode"]])
def test_a_locked_output_is_named(
    command: list[str],
    open_folder: Path,
    unprivileged: Callable[[], AbstractContextManager[None]],
    capsys: Texts,
) -> None:
    locked = open_folder / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    with unprivileged():
        check([*command, "--output", str(locked)], str(locked), capsys)
        check([*command, "--output", str(locked / "new")], str(locked), capsys)


@NO_GPU
@pytest.mark.parametrize("command", [["bench", "attention"], ["bench", "decode"], ["tune"]])
@pytest.mark.parametrize("arguments", [[], ["--dtype", "float16"], ["--no-such"]])
def test_measuring_without_a_gpu_is_refused(
    command: list[str], arguments: list[str], tmp_path: Path, capsys: Texts
) -> None:
    told = refusal([*command, *arguments], capsys)
    assert "needs a CUDA device" in told or "--no-such" in told


@NO_GPU
@pytest.mark.parametrize("command", [["bench", "attention"], ["bench", "decode"]])
def test_no_output_is_left_without_a_gpu(command: list[str], tmp_path: Path, capsys: Texts) -> None:
    """The folder is tried before the GPU is asked for, and removed again."""
    check([*command, "--output", str(tmp_path / "a" / "b")], "needs a CUDA device", capsys)
    assert not any(tmp_path.iterdir())
