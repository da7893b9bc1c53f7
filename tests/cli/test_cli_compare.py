"""`spattention compare` and `generate` from end to end, at a handful of steps."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from spattention import BandPattern
from spattention.benchmarking.timing import cache_bytes
from spattention.cli import main
from spattention.cli.generate import Options, special_tokens
from spattention.comparison.process import RunFailed
from spattention.loading import model_folder, open_model, open_tokenizer

SMALL = [
    "--steps",
    "3",
    "--context",
    "32",
    "--layers",
    "1",
    "--vocabulary",
    "300",
    "--validation-windows",
    "4",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "books.txt"
    page = "It was a dark and stormy night, and the captain said to the crew: tell us a story.\n"
    path.write_text("\f".join(f"Chapter {k}\n{page * 12}" for k in range(10)))
    return path


@pytest.fixture(scope="module")
def compared(text, tmp_path_factory):
    """A finished comparison of two variants, and what was printed."""
    output = tmp_path_factory.mktemp("compared") / "out"
    arguments = ["compare", *SMALL, "--data", str(text), "--output", str(output)]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("COLUMNS", "140")
        assert main([*arguments, "--patterns", "dense", "shared_local"]) == 0
    return output, printed.getvalue()


def test_it_ends_with_a_table_a_plot_and_a_text(compared):
    output, printed = compared
    title = printed.index("Dense and banded attention compared")
    table = printed[title : printed.index("Unigram entropy")]
    for expected in ("validation", "dense", "tokens/s", "attended", "memory", "MiB", "less)"):
        assert expected in table
    assert max(map(len, table.splitlines())) <= 80
    assert "Unigram entropy of the evaluated windows" in printed
    assert "A text that shared_local continues" in printed
    found = json.loads((output / "results.json").read_text())
    assert [row["attention"] for row in found["table"]] == ["dense", "shared_local"]
    orders = {run["order"] for run in found["runs"]}
    assert len(orders) == 1
    assert all(run["continuation"] for run in found["runs"])
    assert found["model"] == "models/shared_local-seed0"
    assert found["missing"] == []
    assert not list((output / "training").iterdir())  # the state of training goes with its result
    losses = json.loads((output / "models" / "dense-seed0" / "losses.json").read_text())
    assert losses["format"] == "spattention-run"
    assert losses["recipe"]["attention"] == "dense"
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "| shared_local |" in (output / "results.md").read_text()


def test_a_second_command_adds_patterns(compared, text, capsys):
    """A second run has nothing to do and more patterns add to it."""
    output, _ = compared
    kept = output / "runs" / "dense-seed0.json"
    before = kept.stat().st_mtime_ns
    arguments = ["compare", *SMALL, "--data", str(text), "--output", str(output)]
    patterns = ["dense", "shared_local", "exclusive:prefix=2"]
    assert main([*arguments, "--patterns", *patterns]) == 0
    assert "Finished before: 2." in capsys.readouterr().out
    assert kept.stat().st_mtime_ns == before
    found = json.loads((output / "results.json").read_text())
    assert [row["attention"] for row in found["table"]] == patterns
    pairs = {run["attention"]: run["pairs"] for run in found["runs"]}
    assert pairs["exclusive:prefix=2"] == sum(BandPattern.exclusive(8, 32, prefix=2).pairs(32))


def test_other_settings_in_the_same_folder_are_refused(compared, text, capsys):
    output, _ = compared
    arguments = ["compare", *SMALL, "--data", str(text), "--output", str(output)]
    assert main([*arguments, "--learning-rate", "0.5"]) == 2
    assert "learning_rate was 0.006, now 0.5" in capsys.readouterr().err


def contents(folder):
    return {
        path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    "changes",
    [
        ["--restart", "--data", "nowhere.txt"],
        ["--restart", "--context", "500000"],
        ["--restart", "--steps", "0"],
        ["--restart", "--seeds", "-1"],
        ["--restart", "--learning-rate", "inf"],
        ["--restart", "--vocabulary", "3"],
        ["--vocabulary", "290"],  # other settings, and other tokens
        ["--held-out", "0.4"],
    ],
)
def test_a_refused_call_changes_nothing(compared, text, changes, capsys):
    output, _ = compared
    before = contents(output)
    arguments = ["compare", *SMALL, "--data", str(text), "--output", str(output)]
    assert main([*arguments, *changes]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert contents(output) == before
    assert not (output / ".preparing").exists()


def test_a_refused_call_leaves_no_new_folder(tmp_path, capsys):
    output = tmp_path / "deep" / "out"
    assert main(["compare", "--data", "nowhere.txt", "--output", str(output)]) == 2
    assert not output.parent.exists()


def test_restart_replaces_runs_models_and_data(compared, text, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(compared[0], output)
    arguments = ["compare", *SMALL, "--data", str(text), "--output", str(output), "--restart"]
    assert main([*arguments, "--patterns", "exclusive", "--held-out", "0.4"]) == 0
    assert [file.name for file in (output / "runs").iterdir()] == ["exclusive-seed0.json"]
    assert [file.name for file in (output / "models").iterdir()] == ["exclusive-seed0"]
    found = json.loads((output / "data" / "facts.json").read_text())
    assert found["validation_documents"] == 4
    assert json.loads((output / "results.json").read_text())["data"]["digest"] == found["digest"]


def test_an_interruption_keeps_what_is_finished(text, tmp_path):
    output = tmp_path / "out"
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from spattention.cli import main; sys.exit(main())"
    )
    arguments = ["compare", *SMALL, "--data", str(text), "--output", str(output)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments, "--seeds", *map(str, range(50))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "COLUMNS": "140"},
    )
    first = output / "runs" / "dense-seed0.json"
    until = time.monotonic() + 200
    while not first.exists() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does: to parent and children alike
    printed, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "Interrupted. The same command continues" in printed
    found = json.loads((output / "results.json").read_text())
    assert found["runs"][0]["attention"] == "dense"
    assert "Not finished" in (output / "results.md").read_text()
    assert len(found["missing"]) + len(found["runs"]) == 250


def test_generate_continues_a_text(compared, capfd):
    output, _ = compared
    arguments = ["It was a", "--max-new-tokens", "5"]
    assert main(["generate", str(output), *arguments]) == 0
    first = capfd.readouterr()
    assert first.out.startswith("It was a")
    assert "5 tokens after a prompt of" in first.err
    assert "tokens/s, cache" in first.err
    assert main(["generate", str(output / "models" / "shared_local-seed0"), *arguments]) == 0
    assert capfd.readouterr().out == first.out


def test_generate_reads_a_file(compared, text, capfd, tmp_path):
    output, _ = compared
    short = tmp_path / "prompt.txt"
    short.write_text("the crew")
    arguments = ["--file", str(short), "--max-new-tokens", "3", "--temperature", "0"]
    assert main(["generate", str(output), *arguments]) == 0
    assert capfd.readouterr().out.startswith("the crew")
    assert main(["generate", str(output), "--file", str(text)]) == 2
    assert "must be shorter than the model's context of 32 tokens" in capfd.readouterr().err


def test_generate_says_what_is_wrong(compared, capsys, tmp_path):
    output, _ = compared
    for arguments, error in (
        ([str(tmp_path), "hello"], "must hold a saved model (config.json), a training run"),
        ([str(output)], "give a prompt or --file"),
        ([str(output), ""], "at least one token, got none"),
        ([str(output), "a", "--top-k", "0"], "`--top-k` must be at least 1, got 0"),
    ):
        assert main(["generate", *arguments]) == 2
        assert error in capsys.readouterr().err


def test_generate_without_a_tokenizer_says_so(compared, capsys, tmp_path):
    output, _ = compared
    model = model_folder(output)
    copied = shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("token*"))
    assert main(["generate", str(copied), "hello"]) == 2
    assert "must hold a tokenizer, got none with words" in capsys.readouterr().err


@pytest.mark.parametrize("told", [True, False])
def test_generate_stops_at_the_end_of_the_text(compared, told, tmp_path, capfd):
    folder = compared[0] / "models" / "shared_local-seed0"
    model, tokenizer = open_model(folder), open_tokenizer(folder)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 0
    if not told:  # a model that was saved without it: the tokenizer's holds
        model.generation_config.eos_token_id = model.config.eos_token_id = None
    torch.nn.init.zeros_(model.lm_head.weight)  # token 0, the end of the text, comes first
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert main(["generate", str(tmp_path), "It was a", "--temperature", "0"]) == 0
    assert "\n1 tokens after a prompt of" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("model", "tokenizer", "expected"),
    [
        ((None, None), (5, 0), (5, 0)),  # a padding token 0 is one
        ((None, None), (5, None), (5, 5)),
        (([7, 5], None), (5, None), ([7, 5], 7)),
        ((0, None), (5, None), (0, 0)),
        ((None, None), (None, None), (None, None)),
    ],
)
def test_special_tokens(model, tokenizer, expected):
    names = ("eos_token_id", "pad_token_id")
    config = SimpleNamespace(**dict(zip(names, model)))
    found = special_tokens(
        SimpleNamespace(generation_config=config), SimpleNamespace(**dict(zip(names, tokenizer)))
    )
    assert found == dict(zip(names, expected))


def test_the_help_says_which_model_is_taken(compared, tmp_path):
    assert "its first model with bands is taken" in " ".join((Options.__doc__ or "").split())
    found = json.loads((compared[0] / "results.json").read_text())
    first = next(run["model"] for run in found["runs"] if run["attention"] != "dense")
    assert model_folder(compared[0]) == compared[0] / "models" / first


def test_the_size_of_the_cache(compared):
    output, _ = compared
    folder = output / "models" / "dense-seed0"
    model, tokenizer = open_model(folder), open_tokenizer(folder)
    inputs = tokenizer("It was", return_tensors="pt", return_token_type_ids=False)
    cache = model(**inputs, use_cache=True).past_key_values
    length = inputs["input_ids"].shape[1]
    assert cache_bytes(cache) == 2 * 1 * 128 * length * 4  # keys and values, layers, width, float32


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--patterns", "spiral"], "a pattern must be one of"),
        (["--patterns", "dense", "dense"], "`--patterns` must name each only once"),
        (["--steps", "0", "--context", "64"], "`steps` must be in [1, 1,000,000,000], got 0"),
        (["--data", "nowhere.txt"], "neither a file nor a folder"),
        (["--model", "gpt"], "`name` must be one of"),
        (["--context", "500000"], "`context` must be at most the"),
    ],
)
def test_compare_says_what_is_wrong_before_it_trains(arguments, error, text, tmp_path, capsys):
    command = ["compare", "--data", str(text), "--output", str(tmp_path / "out"), *arguments]
    assert main(command) == 2
    assert error in capsys.readouterr().err


def test_a_pattern_that_is_dense_is_told(text, tmp_path, capsys):
    """At a span of 32 the default window of geometric bands, 128, holds all of them."""
    arguments = ["--data", str(text), "--output", str(tmp_path / "out"), "--threads", "1"]
    pattern = "shared_local:widths=geometric"
    assert main(["compare", *SMALL, *arguments, "--patterns", pattern]) == 0
    told = capsys.readouterr().err
    assert f"warning: every head of {pattern} attends all distances: this is dense" in told


def test_a_run_that_fails_is_told_in_one_line(text, tmp_path, capsys, monkeypatch):
    def fails(run, folder, on_event):
        raise RunFailed(f"{run.name} failed:\nTraceback (most recent call last):\nOSError: full")

    monkeypatch.setattr("spattention.cli.compare.train_in_process", fails)
    output = tmp_path / "out"
    arguments = ["compare", *SMALL, "--data", str(text), "--output", str(output)]
    assert main([*arguments, "--patterns", "dense"]) == 1
    told = capsys.readouterr().err
    assert "RunFailed: dense-seed0 failed: OSError: full; `spattention --traceback" in told
    assert told.count("\n") == 1
