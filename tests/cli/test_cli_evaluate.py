"""`spattention evaluate` from end to end on a small comparison."""

import json
import math
import shutil

import numpy as np
import pytest

from spattention.cli import main
from spattention.cli.evaluate import beside_chance
from spattention.data.token_file import write_token_file
from spattention.data.tokens import TokenStream
from spattention.evaluation.perplexity import Mean
from spattention.evaluation.tasks import TaskScore

SMALL = ["--steps", "3", "--context", "64", "--layers", "1", "--vocabulary", "300"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    page = "It was a dark and stormy night, and the captain said to the crew: tell us a story.\n"
    (folder / "books.txt").write_text("\f".join(f"Chapter {k}\n{page * 12}" for k in range(10)))
    arguments = ["--data", str(folder / "books.txt"), "--output", str(folder / "out")]
    patterns = ["--patterns", "exclusive", "longformer"]
    assert main(["compare", *SMALL, *arguments, *patterns, "--validation-windows", "4"]) == 0
    return folder / "out"


def evaluate(compared, output, *more):
    return main(["evaluate", str(compared), "--output", str(output), "--items", "3", *more])


def test_it_ends_with_tables_json_and_a_plot(compared, tmp_path, capsys):
    assert evaluate(compared, tmp_path, "--windows", "3", "--batch", "2") == 0
    printed = capsys.readouterr().out
    for expected in ("Validation loss", "Recall", "near chance", "Heads", "±"):
        assert expected in printed
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["attention"] == "spattention"
    assert found["loss"]["context"] == 64
    assert found["loss"]["loss"]["items"] == 3
    assert {score["task"] for score in found["recall"]} == {"copying", "pairs", "needle"}
    assert len(found["heads"]) == 1
    assert len(found["heads"][0]["entropy"]) == 8
    assert all(0 <= value < math.log(64) for value in found["heads"][0]["entropy"])
    assert found["tasks"] is None
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert "| needle at 50 % of the context |" in (tmp_path / "evaluation.md").read_text()


def test_the_loss_is_that_of_the_comparison(compared, tmp_path):
    model = compared / "models" / "longformer-seed0"
    data = ["--data", str(compared / "data"), "--windows", "4", "--parts", "loss"]
    assert evaluate(model, tmp_path, *data) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    results = json.loads((compared / "results.json").read_text())
    (run,) = [run for run in results["runs"] if run["attention"] == "longformer"]
    assert found["attention"] == "longformer"
    assert found["loss"]["loss"]["mean"] == pytest.approx(run["validation_loss"], abs=1e-5)
    assert found["recall"] is None


def test_text_is_tokenized_for_the_model(compared, tmp_path):
    """A text file has the loss of the same text that was prepared with the model's tokenizer."""
    model = compared / "models" / "exclusive-seed0"
    book = tmp_path / "book.txt"
    book.write_text("\f".join(f"It was a dark night, and {k} men came.\n" * 9 for k in range(4)))
    prepared = ["prepare", str(book), "--output", str(tmp_path / "prepared"), "--held-out", "0.5"]
    assert main([*prepared, "--tokenizer", str(model)]) == 0
    (tmp_path / "held.txt").write_text("\f".join(book.read_text().split("\f")[1::2]))
    losses = []
    for data in ("held.txt", "prepared"):
        output = tmp_path / f"of-{data}"
        assert evaluate(model, output, "--data", str(tmp_path / data), "--parts", "loss") == 0
        losses.append(json.loads((output / "evaluation.json").read_text())["loss"]["loss"])
    assert losses[0] == losses[1]


def test_data_of_another_tokenizer_are_refused(compared, tmp_path, capsys):
    """Their tokens would mean other text, and the loss nothing."""
    (tmp_path / "a.txt").write_text("\f".join(f"{k} other words\n" * 30 for k in range(20)))
    arguments = ["prepare", str(tmp_path / "a.txt"), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--vocabulary", "270", "--held-out", "0.5"]) == 0
    model = compared / "models" / "exclusive-seed0"
    data = ["--data", str(tmp_path / "out"), "--parts", "loss"]
    assert evaluate(model, tmp_path / "found", *data) == 2
    assert "must be prepared with the model's tokenizer" in capsys.readouterr().err


def test_the_table_of_losses_fits_a_screen(compared, tmp_path):
    assert evaluate(compared, tmp_path, "--windows", "2", "--parts", "loss") == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["loss"]["edges"] == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--context", "65"], "`--context` must be from 2 to the model's 64, got 65"),
        (["--parts", "tasks"], '`--parts` must name "tasks" if and only if'),
        (["--data", "nowhere"], "`--data` must be text (.txt, .jsonl), a token file"),
        (["--windows", "0"], "`--windows` must be at least 1, got 0"),
        (["--limit", "0"], "`--limit` must be at least 1, got 0"),
        (["--shots", "0", "-1"], "`--shots` must be integers from 0 to 1000, got [0, -1]"),
    ],
)
def test_what_is_wrong_is_said(compared, tmp_path, arguments, error, capsys):
    assert evaluate(compared, tmp_path, *arguments) == 2
    assert error in capsys.readouterr().err
    assert not (tmp_path / "evaluation.json").exists()


def test_tokens_that_the_model_does_not_know(compared, tmp_path, capsys):
    stream = TokenStream.from_documents([np.full(300, 60_000, np.uint16)])
    write_token_file(tmp_path / "a.u16.xz", stream, 7)
    assert evaluate(compared, tmp_path, "--data", str(tmp_path / "a.u16.xz")) == 2
    assert "entries, got token 60000" in capsys.readouterr().err


def test_one_item_has_no_error_in_json(compared, tmp_path):
    assert evaluate(compared, tmp_path, "--windows", "1", "--parts", "loss") == 0
    text = (tmp_path / "evaluation.json").read_text()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(text, parse_constant=refuse)["loss"]["loss"]["error"] is None


def test_a_model_alone_needs_data(compared, tmp_path, capsys):
    assert evaluate(compared / "models" / "exclusive-seed0", tmp_path) == 2
    assert "`--data` must name held-out text" in capsys.readouterr().err


LOSS = ("--windows", "2", "--parts", "loss")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_results_of_another_model_are_kept(compared, tmp_path, capsys):
    """Another model, in whatever folder of the same name, is refused before any work."""
    data = ["--data", str(compared / "data"), *LOSS]
    models = [tmp_path / run / "checkpoint-200" for run in ("a", "b")]
    for model, name in zip(models, ("exclusive", "longformer")):
        shutil.copytree(compared / "models" / f"{name}-seed0", model)
    output = tmp_path / "out"
    assert evaluate(models[0], output, *data) == 0
    before = contents(output)
    assert evaluate(models[1], output, *data) == 2
    told = capsys.readouterr().err
    assert f"holds the evaluation of another model, {models[0]}, got {models[1]}" in told
    assert "name another folder, or give --replace" in told
    assert contents(output) == before
    assert evaluate(models[0], output, *data) == 0  # the same again
    # The same weights with another config are another model.
    config = json.loads((models[0] / "config.json").read_text())
    (models[0] / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert evaluate(models[0], output, *data) == 2
    assert evaluate(models[1], output, *data, "--replace") == 0
    assert "b/checkpoint-200" in (output / "evaluation.md").read_text()


def test_titles_tell_checkpoints_apart(compared, tmp_path, capsys):
    data = ["--data", str(compared / "data"), *LOSS]
    for run in ("a", "b"):
        model = shutil.copytree(
            compared / "models" / "exclusive-seed0", tmp_path / run / "checkpoint-200"
        )
        assert evaluate(model, tmp_path / f"{run}-out", *data) == 0
        title = f"Evaluation of .../{tmp_path.name}/{run}/checkpoint-200"
        assert title in capsys.readouterr().out
        text = (tmp_path / f"{run}-out" / "evaluation.md").read_text()
        assert text.startswith(f"# {title}\n")
        assert f"Model `{model}`, digest " in text


def test_parts_that_are_not_evaluated_again_are_kept(compared, tmp_path, capsys):
    assert evaluate(compared, tmp_path, "--windows", "2", "--parts", "loss", "heads") == 0
    before = contents(tmp_path)
    assert evaluate(compared, tmp_path, *LOSS) == 2
    assert "holds results of the parts ['heads'], which are not in" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert evaluate(compared, tmp_path, *LOSS, "--replace") == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["heads"] is None


@pytest.mark.parametrize("content", ["[]", "x", '{"format": "other"}'])
def test_foreign_results_are_kept(compared, tmp_path, content, capsys):
    (tmp_path / "evaluation.json").write_text(content)
    assert evaluate(compared, tmp_path, *LOSS) == 2
    assert f"{tmp_path / 'evaluation.json'}" in capsys.readouterr().err
    assert contents(tmp_path) == {"evaluation.json": content.encode()}


def test_an_interruption_leaves_nothing_half_written(compared, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("spattention.cli.evaluate.evaluation_figure", interrupted)
    assert evaluate(compared, tmp_path / "out", *LOSS) == 130
    assert not (tmp_path / "out").exists()


def test_a_run_brings_its_own_data(compared, tmp_path, capsys):
    """A checkpoint of a run on one prepared folder needs no --data."""
    run = tmp_path / "run"
    checkpoint = shutil.copytree(compared / "models" / "exclusive-seed0", run / "checkpoint-3")
    mark = {"recipe": {"data": [str(compared / "data")], "validation": []}}
    (run / "run.json").write_text(json.dumps(mark))
    assert evaluate(checkpoint, tmp_path / "out", *LOSS) == 0
    for recipe, error in (
        ({"data": ["gone"]}, "nor of a run on one prepared folder"),
        ({"data": [str(compared / "data")] * 2}, "nor of a run on one prepared folder"),
        ({"data": 3}, "run.json must hold the recipe of a run with its `data`"),
        ([], "run.json must hold the recipe of a run with its `data`"),
    ):
        (run / "run.json").write_text(json.dumps({"recipe": recipe}))
        capsys.readouterr()
        assert evaluate(checkpoint, tmp_path / "other", *LOSS) == 2
        assert error in capsys.readouterr().err


def test_perplexity_stands_beside_the_loss(compared, tmp_path):
    assert evaluate(compared, tmp_path, *LOSS) == 0
    loss = json.loads((tmp_path / "evaluation.json").read_text())["loss"]["loss"]["mean"]
    (row,) = [r for r in (tmp_path / "evaluation.md").read_text().splitlines() if "| all |" in r]
    assert row.split("|")[3].strip() == f"{math.exp(loss):.2f}"


def test_chance_is_told_on_both_sides():
    def score(mean, error, chance=0.5):
        return TaskScore("copa", "acc", 0, Mean(mean, error, 100), chance)

    assert beside_chance(score(0.7, 0.05)) == ""
    assert beside_chance(score(0.55, 0.05)) == "near chance"
    assert beside_chance(score(0.45, 0.05)) == "near chance"
    assert beside_chance(score(0.3, 0.05)) == "below chance"
    # No hit among few items is what guessing gives, too.
    assert beside_chance(score(0.0, 0.0, chance=0.01)) == "near chance"
    assert beside_chance(score(0.0, 0.0, chance=0.25)) == "below chance"
    assert beside_chance(score(3.0, 0.1, chance=None)) == ""
