"""`spattention draw` of a saved model: the bands of one of its layers."""

from __future__ import annotations

import pytest
from saved_model import save
from transformers import AutoModelForCausalLM

import spattention as spa
from spattention.cli import main
from spattention.plots import pattern_figure

TITLE = "layer 1, 4 heads, span 48"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("banded")
    model = spa.hf.apply(dense(path), [None, spa.BandPattern.sliding_window(4, 48, 5)])
    model.save_pretrained(path)
    return path


def dense(path):
    return AutoModelForCausalLM.from_pretrained(save(path, bands=False))


def drawn(path, tmp_path, *options):
    output = tmp_path / "bands.svg"
    code = main(["draw", str(path), "--output", str(output), *options])
    return code, output


def test_a_saved_model_is_drawn(folder, tmp_path, monkeypatch):
    """The first layer with bands; heads and span are the model's."""
    titles = []

    def noting(pattern, length, title):
        titles.append((pattern, title))
        return pattern_figure(pattern, length, title)

    monkeypatch.setattr("spattention.cli.draw.pattern_figure", noting)
    for options in ((), ("--layer", "1", "--length", "20")):
        code, output = drawn(folder, tmp_path, *options)
        assert code == 0
        assert output.read_bytes().startswith(b"<?xml")
    assert len(titles) == 2
    for pattern, title in titles:
        assert pattern == spa.BandPattern.sliding_window(4, 48, 5)
        assert title.endswith(TITLE)


def test_a_layer_that_cannot_be_drawn_is_named(folder, tmp_path, capsys):
    for path, options, said in (
        (folder, ("--layer", "0"), "with bands, [1], got 0"),
        (folder, ("--layer", "2"), "with bands, [1], got 2"),
        (save(tmp_path / "dense", bands=False), (), "must hold a model with bands, it has none"),
        (tmp_path, (), "must hold a saved model"),
        (tmp_path / "gone", (), "must be the folder of a saved model, there is no such folder"),
        ("dense", ("--layer", "0"), "`--layer` must be of a saved model with bands"),
    ):
        code, output = drawn(path, tmp_path, *options)
        assert code == 2
        assert not output.exists()
        assert said in capsys.readouterr().err
