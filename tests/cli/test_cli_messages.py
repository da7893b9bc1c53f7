"""Messages of commands say what is there, and what a person may give instead."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import saved_model
import transformers
from saved_model import CONTEXT

from spattention import baselines, related
from spattention.choice import attention_choice
from spattention.cli import main
from spattention.data.text import iterate_documents
from spattention.training.checkpoints import MANIFEST

OTHERS = {
    "mea": lambda model: related.apply(model, related.MEA(4, CONTEXT)),
    "longformer": lambda model: baselines.apply(model, baselines.Longformer(4, CONTEXT)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Saved models: dense, and with each of `OTHERS`."""
    folder = tmp_path_factory.mktemp("models")
    saved_model.save(folder / "dense", bands=False)
    for name, apply in OTHERS.items():
        saved_model.save(folder / name, bands=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / name)
        apply(model).save_pretrained(folder / name)
    return folder


def refused(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert len(said.err.splitlines()) == 1
    return said.err


@pytest.mark.parametrize("name", OTHERS)
def test_fit_names_the_attention_of_its_model(name, folders, tmp_path, capsys):
    """Not a call to make the model known, after which it would be refused all the same."""
    said = refused(capsys, "fit", folders / name, "--output", tmp_path / "o")
    assert f"`MODEL` must be dense, {folders / name} has the attention `{name}` already" in said


def test_fit_checks_the_prefix_before_it_profiles(folders, tmp_path, capsys):
    said = refused(capsys, "fit", folders / "dense", "--output", tmp_path / "o", "--prefix", 17)
    assert said == (
        "error: `--prefix` must be at most 16, the first tokens that are measured, got 17\n"
    )
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(("make", "found"), [(True, "it is a folder"), (False, "no such file")])
def test_a_folder_is_no_missing_profile(make, found, folders, tmp_path, capsys):
    if make:
        (tmp_path / "p").mkdir()
    arguments = ("--output", tmp_path / "o", "--profile", tmp_path / "p")
    said = refused(capsys, "fit", folders / "dense", *arguments)
    assert f"{tmp_path / 'p'} must be a profile, " in said
    assert found in said


@pytest.mark.parametrize(
    ("name", "found"), [("dense", "dense attention"), ("mea", "`mea`"), ("longformer", "`longform")]
)
def test_a_comparison_names_the_attention(name, found, folders, capsys):
    said = refused(capsys, "generate", folders / name, "Once", "--compare", "dense")
    assert f"needs a model with bands, {folders / name} has {found}" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "mea:prefix=4",
            r"a name of \['mix', 'norm', 'components', 'bands'\], got 'prefix=4'",
        ),
        ("mea:band=exclusive", r"got 'band=exclusive', did you mean 'bands'\?"),
        ("mea:bands=mea", r"^`bands` of `mea` must be one of dense, .*, got 'mea'"),
        ("mea:bands=exclusiv", r"^`bands` of `mea` .* did you mean 'exclusive'\?"),
        ("mea:bands=exclusive:x=1", r"^options of `exclusive` are .* got 'x=1'"),
        ("bigbird:bands=dense", r"^options of `bigbird` are .* got 'bands=dense'"),
    ],
)
def test_nested_bands_are_among_the_options(text, message):
    with pytest.raises(ValueError, match=message):
        attention_choice(text, 4, 64)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("[1]", "got list"),
        ("3", "got int"),
        ('{"other": "a"}', "with `--column`), got one with ['other']"),
        ("{", "property name enclosed in double quotes at character"),
        ("[" * 100_000, "RecursionError: maximum recursion depth exceeded"),
    ],
)
def test_bad_lines_are_told_in_words(line, found, tmp_path):
    """Not by the `repr` of an exception."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match='line 2, must be an object with a "text" entry') as caught:
        list(iterate_documents(tmp_path / "a.jsonl"))
    assert found in str(caught.value)
    assert "Error(" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "exclusive,widths=geometric",
            "; options follow a colon, as in exclusive:widths=geometric",
        ),
        ("exclusiv", "local_only, intervals, got 'exclusiv', did you mean 'exclusive'?"),
    ],
)
def test_a_pattern_shows_how_options_are_given(given, message, tmp_path, capsys):
    assert message in refused(capsys, "draw", given, "--output", tmp_path / "a.png")


def test_edges_with_slashes_are_no_folder(tmp_path):
    for name in ("intervals:heads=0-8/0-4+16-32", "exclusive:widths=0/8/32"):
        command = ["draw", name, "--heads", "2", "--span", "32"]
        assert main([*command, "--output", str(tmp_path / "a.svg")]) == 0


def test_prepare_refuses_before_it_imports(tmp_path, capsys, monkeypatch):
    """PyTorch and Transformers take seconds, and an output that exists is seen without them."""
    monkeypatch.setitem(sys.modules, "spattention.cli.prepare", None)
    said = refused(capsys, "prepare", "--output", tmp_path)
    assert f"`--output` must be a new folder, {tmp_path} exists" in said


def test_a_slip_of_a_folder_is_no_data_set(tmp_path, capsys, monkeypatch):
    """A single word may be on the hub; where it is not, the folder with a like name is named."""

    def not_found(name, *arguments, **keywords):
        raise FileNotFoundError(f"{name} is not on the hub")

    monkeypatch.setattr("datasets.load_dataset", not_found)
    (tmp_path / "texts").mkdir()
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, "prepare", "txts", "--output", tmp_path / "o")
    assert said.rstrip().endswith(", did you mean texts?")


def test_a_damaged_manifest_is_told_in_words(folders, capsys):
    manifest = folders / "dense" / MANIFEST
    manifest.write_text("{}")
    said = refused(capsys, "generate", folders / "dense", "Once")
    assert f"{manifest} cannot be read: there is no 'files'" in said


def test_weights_with_bands_need_their_section(tmp_path, capsys):
    """A dense model's config in the folder of one with bands, as a copy leaves it."""
    saved_model.save(tmp_path / "bands")
    saved_model.save(tmp_path / "dense", bands=False)
    (tmp_path / "bands" / "config.json").write_bytes(
        (tmp_path / "dense" / "config.json").read_bytes()
    )
    said = refused(capsys, "generate", tmp_path / "bands", "Once")
    assert "must name the attention of all layers whose weights the checkpoint marks" in said
    assert "model.layers.0.self_attn." in said


def test_a_section_that_was_cut_out_is_missed(tmp_path, capsys):
    """With the name of its attention; only the weights say that they need it."""
    saved_model.save(tmp_path / "bands")
    file = tmp_path / "bands" / "config.json"
    config = json.loads(file.read_text())
    del config["spattention"], config["attn_implementation"]
    file.write_text(json.dumps(config))
    said = refused(capsys, "generate", tmp_path / "bands", "Once")
    assert "marks, got model.layers.0.self_attn." in said
    assert "restore the config.json that the model was saved with" in said


def test_a_generation_config_is_named(tmp_path, capsys):
    saved_model.save(tmp_path / "m")
    file = tmp_path / "m" / "generation_config.json"
    file.write_text('{"max_new_tokens": -3}')
    said = refused(capsys, "generate", tmp_path / "m", "Once")
    assert said.startswith(f"error: {file} must be a generation config of Transformers: ")


@pytest.mark.parametrize("kind", ["link", "loop", "fifo"])
def test_special_files_are_not_looked_up_on_the_hub(kind, tmp_path, monkeypatch, capsys):
    """They are there, but neither files nor folders."""
    monkeypatch.chdir(tmp_path)
    if kind == "fifo":
        os.mkfifo("source")
    else:
        Path("source").symlink_to("source" if kind == "loop" else "nothing")
    said = refused(capsys, "prepare", "source", "--output", "out")
    assert "source is a link to nothing" in said or "source is neither a file nor a folder" in said
    assert "did you mean" not in said
