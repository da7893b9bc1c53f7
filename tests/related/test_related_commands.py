"""`compare`, `evaluate` and `train` with related systems, from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from relatives import CHOSEN, build, tokens

from spattention import related
from spattention.cli import main
from spattention.cli.generate import cache_bytes
from spattention.loading import model_folder, open_model
from spattention.training.pretrain import pretrain
from tests.training.small_run import recipe, write_data

SMALL = ["--steps", "3", "--context", "64", "--layers", "1", "--vocabulary", "300"]
NAMES = ["mea:bands=exclusive", "cca:group=4,window=8", "rrattention:block=16,tau=0.5"]
NAMES += ["dga:group=4", "recurrent_near:bands=exclusive", "elementwise:order=2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    page = "It was a dark and stormy night, and the captain said to the crew: tell us a story.\n"
    (folder / "books.txt").write_text("\f".join(f"Chapter {k}\n{page * 12}" for k in range(10)))
    return folder / "books.txt"


def test_compare_and_evaluate_know_them(text, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["compare", *SMALL, "--data", str(text), "--output", str(output)]
    more = ["--patterns", *NAMES, "--validation-windows", "4"]
    assert main([*arguments, *more]) == 0, capsys.readouterr().err
    results = json.loads((output / "results.json").read_text())
    assert [run["attention"] for run in results["runs"]] == NAMES
    for run, name in zip(results["runs"], NAMES):
        found = tmp_path / name.partition(":")[0]
        command = ["evaluate", str(output / "models" / Path(run["model"]).name)]
        command += ["--output", str(found), "--items", "2", "--windows", "4"]
        assert main([*command, "--data", str(output / "data")]) == 0, capsys.readouterr().err
        evaluated = json.loads((found / "evaluation.json").read_text())
        assert evaluated["attention"] == name.partition(":")[0]
        assert evaluated["loss"]["loss"]["mean"] == pytest.approx(run["validation_loss"], abs=1e-4)
        assert len(evaluated["heads"][0]["distance"]) == 8


def test_what_the_model_cannot_take_fails_at_once(text, tmp_path, capsys):
    """A system that the model cannot have is refused before any run is made."""
    output = tmp_path / "out"
    arguments = ["compare", *SMALL, "--data", str(text), "--output", str(output)]
    assert main([*arguments, "--patterns", "dense", "mea:components=2"]) == 2
    assert "`components` of `mea` must be 0 for a model with a norm" in capsys.readouterr().err
    assert not output.exists()


def test_the_bytes_of_a_state_are_counted():
    """`generate` prints them."""
    model = related.apply(build("llama"), CHOSEN["cca"])
    with torch.no_grad():
        cache = model(tokens(1, 40), use_cache=True).past_key_values
    found = cache_bytes(cache)
    assert found == sum(layer.nbytes for layer in cache.layers) > 0


@pytest.mark.parametrize("name", ["mea", "cca:group=4,window=8", "recurrent_near"])
def test_a_run_goes_on_where_it_stopped(name, tmp_path):
    """Trained weights of a system are in the checkpoint, and come back."""
    small = recipe(write_data(tmp_path), attention=name, steps=4, warmup=1)
    assert pretrain(small, tmp_path / "whole").finished
    assert not pretrain(small, tmp_path / "parts", minutes=0).finished
    assert pretrain(small, tmp_path / "parts").finished
    whole, parts = (open_model(model_folder(tmp_path / n)) for n in ("whole", "parts"))
    for (key, mine), other in zip(whole.named_parameters(), parts.parameters()):
        assert torch.equal(mine, other), key
        if key.endswith("mixing"):
            assert not torch.equal(mine.cpu(), torch.eye(len(mine)))
