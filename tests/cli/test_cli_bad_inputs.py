"""Bad inputs of every command end in one line that says what is wrong, and with status 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from refusals import HUGE, Texts, check, refusal
from saved_model import PROMPT, edit, save

from spattention.cli import main


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("dense"), bands=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of foreign and damaged files."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "text.txt").write_text("one\ftwo\fthree")
    (folder / "long.txt").write_text(f"{PROMPT} " * 100)
    with (folder / "huge.txt").open("wb") as file:
        file.truncate(2**40)  # takes no room on disk
    (folder / "letter.docx").write_bytes(b"PK\x03\x04")
    (folder / "tokens.u16.xz").write_bytes(b"no xz")
    (folder / "list.toml").write_text("steps = [")
    (folder / "wrong.toml").write_text('model = "olmoe-tiny"\nsteps = "many"\n')
    (folder / "recipe.toml").write_text(
        'model = "olmoe-tiny"\ndata = ["gone"]\ncontext = 64\nsteps = 1\nbatch = 1\n'
        'learning_rate = 1e-3\nprecision = "float32"\nloss = "plain"\n'
    )
    (folder / "prepared").mkdir()
    (folder / "prepared" / "facts.json").write_text("[]")
    (folder / "damaged").mkdir()
    (folder / "damaged" / "config.json").write_text("[]")
    return folder


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--temperature", "nan"], "`--temperature` must be at least 0, got nan"),
        (["--temperature", "inf"], "`--temperature` must be at most 100.0, got inf"),
        (["--temperature", "-1"], "`--temperature` must be at least 0, got -1.0"),
        (["--temperature", "1e-300"], "`--temperature` must be 0 or at least 0.01, got 1e-300"),
        (["--max-new-tokens", "0"], "`--max-new-tokens` must be at least 1, got 0"),
        (["--max-new-tokens", HUGE], "`--max-new-tokens` must be at most 2,147,483,647, got"),
        (["--top-k", "0"], "`--top-k` must be at least 1, got 0"),
        (["--top-k", HUGE], "`--top-k` must be at most 2,147,483,647, got"),
        (["--seed", "-1"], "`--seed` must be at least 0, got -1"),
        (["--seed", "4294967296"], "`--seed` must be at most 4,294,967,295, got 4294967296"),
        (["--file", "{files}/text.txt"], "give a prompt or --file, one of them"),
        (["--compare", "dense"], "`--compare dense` needs a model with bands"),
    ],
)
def test_generate_refuses_values(
    dense: Path, files: Path, arguments: list[str], error: str, capsys: Texts
) -> None:
    given = [text.format(files=files) for text in arguments]
    check(["generate", str(dense), PROMPT, *given], error, capsys)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("gone.txt", "`--file` must be a text file"),
        ("prepared", "`--file` must be a text file"),
        ("binary.txt", "binary.txt must be UTF-8 text"),
        ("huge.txt", "`--file` must have at most 67,108,864 bytes"),
        ("long.txt", "the prompt must be shorter than the model's context of 600 tokens"),
    ],
)
def test_generate_refuses_prompts(
    saved: Path, files: Path, name: str, error: str, capsys: Texts
) -> None:
    check(["generate", str(saved), "--file", str(files / name)], error, capsys)


def test_generate_refuses_text_that_is_no_unicode(saved: Path, capsys: Texts) -> None:
    """A byte of a command line that is no UTF-8 arrives as half a surrogate pair."""
    check(["generate", str(saved), "a \udcff b"], "the prompt must hold Unicode text", capsys)


def test_generate_refuses_a_foreign_tokenizer(tmp_path: Path, capsys: Texts) -> None:
    folder = save(tmp_path, bands=False)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["I"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    check(["generate", str(folder), "I"], "270 entries, got token 5000", capsys)


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_logits_that_are_not_finite_are_told(
    tmp_path: Path, temperature: str, capsys: Texts
) -> None:
    """Of NaN the likeliest token is any, and the loss is none: neither passes for a result."""
    folder = save(tmp_path / "model")
    edit(folder / "config.json", rms_norm_eps=-1.0)
    command = ["generate", str(folder), PROMPT, "--temperature", temperature]
    check(command, f"{folder} must give finite logits, got NaN", capsys)
    data = ["--data", str(_prepared(tmp_path, folder)), "--context", "64", "--windows", "2"]
    capsys.readouterr()
    command = ["evaluate", str(folder), *data, "--output", str(tmp_path / "out")]
    check(command, f"{folder} must give finite losses, got nan", capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["generate", "evaluate"])
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("gone", "there is no such folder"),
        ("text.txt", "there is no such folder"),
        ("prepared", "it has none of them"),
        ("damaged", "config.json must hold a JSON object, got list"),
    ],
)
def test_foreign_models_are_refused(
    files: Path, tmp_path: Path, command: str, name: str, error: str, capsys: Texts
) -> None:
    more = [PROMPT] if command == "generate" else ["--output", str(tmp_path / "out")]
    check([command, str(files / name), *more], error, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["generate", "evaluate", "fit", "train", "draw"])
def test_an_adapter_is_no_whole_model(command: str, tmp_path: Path, capsys: Texts) -> None:
    """Every command that opens a model says what an adapter's folder is, and how it becomes one."""
    adapter, output = tmp_path / "adapter", str(tmp_path / "out.png")
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    called = {
        "generate": [str(adapter), PROMPT],
        "train": ["tiny-cpu", "--set", f"model={adapter}", "--output", output],
    }
    arguments = called.get(command, [str(adapter), "--output", output])
    said = f"{adapter} must hold a whole model, got an adapter (adapter_config.json): merge it"
    check([command, *arguments], said, capsys)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--windows", HUGE], "`--windows` must be at most 2,147,483,647, got"),
        (["--items", "0"], "`--items` must be at least 1, got 0"),
        (["--items", "2000000000"], "`--items` times `--context` must be at most 67,108,864 tok"),
        (["--batch", HUGE], "`--batch` must be at most 2,147,483,647, got"),
        (["--context", "1"], "`--context` must be from 2 to the model's 600, got 1"),
        (["--context", HUGE], "`--context` must be from 2 to the model's 600, got"),
        (["--limit", "-3"], "`--limit` must be at least 1, got -3"),
        (["--shots", "100000"], "`--shots` must be integers from 0 to 1000, got [100000]"),
        (["--seed", "-1"], "`--seed` must be at least 0, got -1"),
        (["--tasks", "copa", "--task-data", "{files}/gone"], "`--task-data` must be a folder, got"),
        (["--data", "{files}/letter.docx"], "`--data` must be text (.txt, .jsonl), a token file"),
        (["--data", "{files}/tokens.u16.xz"], "tokens.json is missing"),
        (["--data", "{files}/prepared"], "{files}/prepared"),
        (["--output", "{files}/text.txt"], "`--output` must be a folder"),
        (["--output", "{files}/text.txt/out"], "text.txt"),
    ],
)
def test_evaluate_refuses_by_name(
    saved: Path, files: Path, tmp_path: Path, arguments: list[str], error: str, capsys: Texts
) -> None:
    given = [text.format(files=files) for text in arguments]
    data = [] if "--data" in arguments else ["--data", str(_prepared(tmp_path, saved))]
    output = ["--output", str(tmp_path / "out")]
    command = ["evaluate", str(saved), *output, *data, *given]
    check(command, error.format(files=files), capsys)
    assert not (tmp_path / "out").exists()


def _prepared(folder: Path, model: Path) -> Path:
    """Data for a model, of one short document for training and one for validation."""
    (folder / "source.txt").write_text("\f".join(f"{PROMPT} {k}\n" * 60 for k in range(4)))
    arguments = ["--tokenizer", str(model), "--held-out", "0.25", "--output", str(folder / "data")]
    assert main(["prepare", str(folder / "source.txt"), *arguments]) == 0
    return folder / "data"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--heads", "100000"], "`--heads` must be at most 128, got 100000"),
        (["--heads", "0"], "`--heads` must be at least 1, got 0"),
        (["--span", HUGE], "`--span` must be at most 2,147,483,647, got"),
        (["--span", "-1"], "`--span` must be at least 1, got -1"),
        (["--length", "0"], "`--length` must be at least 1, got 0"),
        (["--dots-per-inch", "0"], "`--dots-per-inch` must be at least 1, got 0"),
        (["--dots-per-inch", "100000"], "`--dots-per-inch` must give less than 65,536 pixels a si"),
        (["sliding_window:window=-1"], "`window` must be between 1 and `span` = 1024, got -1"),
        (["sliding_window:window=1" + "0" * 5000], "must have at most 4000 characters, got 5001"),
        (["slidin_window"], "got 'slidin_window', did you mean 'sliding_window'?"),
        (["sliding_window:windw=3"], "got 'windw=3', did you mean 'window'?"),
        (["--output", "{files}"], "`--output` must end with one of"),
        (["--output", "{files}/text.txt/a.png"], "text.txt"),
    ],
)
def test_draw_refuses_by_name(
    files: Path, tmp_path: Path, arguments: list[str], error: str, capsys: Texts
) -> None:
    given = [text.format(files=files) for text in arguments]
    output = [] if "--output" in arguments else ["--output", str(tmp_path / "a.png")]
    check(["draw", *given, *output], error, capsys)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["{files}/text.tx"], "text.tx is neither a file nor a folder, did you mean {files}/text"),
        (["books/novels/one.txt"], "books/novels/one.txt is neither a file nor a folder"),
        (["novel.jsonl"], "novel.jsonl is neither a file nor a folder"),
        (["{files}/binary.txt"], "binary.txt must be UTF-8 text"),
        (["{files}/letter.docx"], "letter.docx must be text (.txt), JSON lines (.jsonl)"),
        (["{files}/text.txt", "--held-out", "nan"], "`held_out` must lie between 0 and 0.5"),
        (["{files}/text.txt", "--vocabulary", "3"], "`vocabulary` must be at least 257"),
        (["{files}/text.txt", "--tokenizer", "{files}/gone"], "gone is neither a file nor a f"),
        (["{files}/text.txt", "--tokenizer", "{files}/list.toml"], "list.toml must be a tokenizer"),
        (["{files}/text.txt", "--output", "{files}/text.txt"], "`--output` must be a new folder"),
        (["{files}/text.txt", "--output", "{files}/text.txt/a"], "text.txt"),
    ],
)
def test_prepare_refuses_by_name(
    files: Path, tmp_path: Path, arguments: list[str], error: str, capsys: Texts
) -> None:
    given = [text.format(files=files) for text in arguments]
    output = [] if "--output" in arguments else ["--output", str(tmp_path / "out")]
    check(["prepare", *given, *output], error.format(files=files), capsys)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["{files}/gone.toml"], "gone.toml is no file"),
        (["{files}"], "must be a recipe in TOML"),
        (["{files}/binary.txt"], "binary.txt must be a recipe in TOML"),
        (["{files}/list.toml"], "list.toml must be a recipe in TOML"),
        (["{files}/wrong.toml"], "must have the fields"),
        (["{files}/recipe.toml"], "got gone"),
        (["{files}/recipe.toml", "--set", "steps"], "`--set` takes NAME=VALUE, got 'steps'"),
        (["{files}/recipe.toml", "--set", "steps=x"], "`steps` must be int, got 'x'"),
        (["{files}/recipe.toml", "--minutes", "nan"], "`--minutes` must be a number from 0 on"),
        (["{files}/recipe.toml", "--set", "model=olmo-tiny"], "did you mean 'olmoe-tiny'?"),
        (["{files}/recipe.toml", "--set", "model=runs/a/b"], "`model` must be one of"),
        (["{files}/recipe.toml", "--set", "model={files}/gone"], "`model` must be one of"),
        (["{files}/recipe.toml", "--set", "model={files}/text.txt"], "`model` must be one of"),
        (["{files}/recipe.toml", "--set", "model={files}/damaged"], "config.json must hold a JSON"),
        (["{files}/recipe.toml", "--output", "{files}/text.txt"], "text.txt"),
    ],
)
def test_train_refuses_by_name(
    files: Path, tmp_path: Path, arguments: list[str], error: str, capsys: Texts
) -> None:
    given = [text.format(files=files) for text in arguments]
    output = [] if "--output" in arguments else ["--output", str(tmp_path / "out")]
    check(["train", *given, *output], error, capsys)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--patterns", "spiral"], "a pattern must be one of"),
        (["--patterns", "exclusiv"], "did you mean 'exclusive'?"),
        (["--seeds", "-1"], "`--seeds` must be between 0 and 2**32 - 1, got -1"),
        (["--steps", "0"], "`steps` must be "),
        (["--learning-rate", "nan"], "`learning_rate` must be "),
        (["--threads", "-1"], "`threads` must "),
        (["--layers", "0"], " must be "),
        (["--held-out", "2"], "`held_out` must lie between 0 and 1, got 2.0"),
        (["--data", "{files}/letter.docx"], "letter.docx must be text (.txt), JSON lines (.jsonl)"),
        (["--data", "{files}/tokens.u16.xz"], "tokens.json is missing"),
        (["--tokenizer", "{files}/list.toml"], "list.toml must be a tokenizer"),
        (["--output", "{files}/text.txt"], "`--output` must be a folder"),
        (["--output", "{files}"], "holds other files"),
    ],
)
def test_compare_refuses_by_name(
    files: Path, tmp_path: Path, arguments: list[str], error: str, capsys: Texts
) -> None:
    given = [text.format(files=files) for text in arguments]
    output = [] if "--output" in arguments else ["--output", str(tmp_path / "out")]
    check(["compare", *given, *output], error, capsys)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "model", "text", "--top-k"],
        ["evaluate", "model", "--items"],
        ["draw", "--heads"],
        ["prepare", "text", "--output", "folder", "--vocabulary"],
        ["train", "recipe", "--minutes"],
        ["compare", "--steps"],
        ["tune", "--heads"],
        ["bench", "attention", "--head-dim"],
    ],
)
def test_a_value_of_another_type_is_refused(command: list[str], capsys: Texts) -> None:
    assert command[-1] in refusal([*command, "many"], capsys)


def test_a_checkpoint_that_is_passed_over_is_told(tmp_path: Path, capfd: Texts) -> None:
    """`generate` and `evaluate` of a run say which newer checkpoint is damaged."""
    from spattention.training.checkpoints import commit

    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    for step in (5, 10):
        commit(save(tmp_path / f"checkpoint-{step}", bands=False), run)
    weights = run / "checkpoint-10" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert main(["generate", str(run), PROMPT, "--max-new-tokens", "2"]) == 0
    told = capfd.readouterr().err
    assert told.startswith(f"warning: damaged checkpoint: {weights} must have ")
    assert f"; {run / 'checkpoint-5'} is taken instead\n" in told
    edit(run / "checkpoint-5" / "config.json", vocab_size=300)
    check(["generate", str(run), PROMPT], "must hold a whole checkpoint: ", capfd)


@pytest.mark.parametrize(
    "command",
    [
        ["prepare", "texts"],
        ["draw"],
        ["fit", "model", "--pairs", "0.5"],
        ["evaluate", "model"],
        ["compare"],
        ["train", "recipe.toml"],
        ["bench", "attention"],
        ["bench", "decode"],
    ],
    ids=lambda command: "-".join(command[:2]),
)
def test_an_output_below_a_file_is_refused(
    command: list[str], tmp_path: Path, capsys: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is looked for or computed."""
    file = tmp_path / "file"
    file.write_text("kept")
    for output in (file / "out.png", file / "deeper" / "out.png"):
        told = refusal([*command, "--output", str(output)], capsys)
        assert f"`--output` must be in a folder, got {output}, where {file} is a file" in told
    told = refusal([*command, "--output", "/proc/new/out.png"], capsys)  # its mode allows files
    assert "`--output` must be where files can be made, got /proc/new/out.png in /proc" in told
    monkeypatch.setattr("spattention.files.tempfile.mkdtemp", _full)
    told = refusal([*command, "--output", str(tmp_path / "new" / "out.png")], capsys)
    assert f"`--output` must be where files can be made, got {tmp_path}" in told
    assert list(tmp_path.iterdir()) == [file]


def _full(**options: Any) -> str:
    raise OSError(28, "No space left on device")
