"""`spattention evaluate` from end to end on a small comparison."""

import json
import math

import numpy as np
import pytest

from spattention.cli import main
from spattention.data.packed import write_packed
from spattention.data.tokens import TokenStream

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


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--context", "65"], "`--context` must be from 2 to the model's 64, got 65"),
        (["--parts", "tasks"], '`--parts` must name "tasks" if and only if'),
        (["--data", "nowhere"], "`--data` must be packed tokens (.u16.xz) or a folder"),
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
    write_packed(tmp_path / "a.u16.xz", stream, 7)
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
