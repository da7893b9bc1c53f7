"""The committed losses of recipes can be drawn, and runs of different recipes are told apart."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
losses = runpy.run_path(str(ROOT / "benchmarks" / "losses.py"))
RUNS = [RECIPES / f"olmoe-0.25b-1.75b.{name}.losses.json" for name in ("dense", "shared_local")]


def test_losses_are_drawn_and_their_ends_are_told(tmp_path, capsys):
    losses["main"](losses["Options"](tuple(RUNS), tmp_path / "new" / "losses.png"))
    assert (tmp_path / "new" / "losses.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out.splitlines()
    last = json.loads(RUNS[1].read_text())["validation"][-1]["eval_loss"]
    assert shown[-1].startswith(f"| `shared_local` | {last:.3f} | ")


def test_more_runs_than_colours_are_all_drawn():
    runs = [losses["read"](RUNS[0])] * 12
    axis = losses["figure"](runs).axes[0]
    assert len(axis.lines) == 2 * len(runs)


def test_different_recipes_are_not_drawn_together(tmp_path):
    """Runs of different recipes are not drawn together."""
    other = RECIPES / "tiny-cpu.dense.losses.json"
    with pytest.raises(SystemExit, match="must have one recipe"):
        losses["main"](losses["Options"]((RUNS[0], other), tmp_path / "losses.png"))
    assert not (tmp_path / "losses.png").exists()


def test_nothing_is_drawn_of_no_runs(tmp_path):
    with pytest.raises(SystemExit, match="must name at least one"):
        losses["main"](losses["Options"]((), tmp_path / "losses.png"))
    assert not (tmp_path / "losses.png").exists()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.losses.json")), ids=lambda path: path.name)
def test_a_record_names_what_made_it(path):
    found = losses["read"](path)
    assert isinstance(found["recipe"]["seed"], int)
    assert found["versions"].keys() >= {"torch", "transformers"}
    for entry in ("command", "commit"):
        assert found[entry], entry
    assert found["train"][-1]["step"] <= found["step"] <= found["recipe"]["steps"]
    assert not any("/" in name for name in found["recipe"]["data"] if name.endswith(".xz"))
