"""Profiles as files: whole, validated, and named where they are damaged or foreign."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from attending import profile_of, random_weights

from spattention import BandPattern as P
from spattention.fitting import ModelIdentity, Profile
from spattention.fitting.picture import profile_figure
from spattention.fitting.profile import rounded
from spattention.fitting.sinks import first_scores, starting_sinks


@pytest.fixture(scope="module")
def profile():
    needle = torch.full((2, 4), 0.25, dtype=torch.float64)
    return profile_of(random_weights(2, 4, 80, 0, 1.0), needle=needle, needles=3, needles_found=2)


def test_a_profile_comes_back_as_it_was_saved(profile, tmp_path):
    path = tmp_path / "deep" / "profile.json"
    profile.save(path)
    back = Profile.load(path)
    assert back == profile
    assert hash(back) == hash(profile)
    assert back != profile_of(random_weights(2, 4, 80, 1, 1.0))
    assert [file.name for file in path.parent.iterdir()] == ["profile.json"]
    assert path.stat().st_mode & 0o777 == 0o644
    without = profile_of(random_weights(1, 2, 5, 0, 1.0))
    without.save(path)
    assert Profile.load(path) == without
    assert Profile.load(path).needle is None


def test_a_failed_save_leaves_the_old_file(profile, tmp_path, monkeypatch):
    path = tmp_path / "profile.json"
    profile.save(path)
    old = path.read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        profile_of(random_weights(1, 2, 5, 0, 1.0)).save(path)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]


def test_rounded_values_survive_json():
    values = torch.rand(50, dtype=torch.float64) ** 9
    kept = rounded(values)
    torch.testing.assert_close(kept, values, rtol=1e-5, atol=0)
    assert torch.equal(torch.tensor(json.loads(json.dumps(kept.tolist())), dtype=kept.dtype), kept)


def changed(**entries):
    return lambda data: data | entries


def without(name):
    return lambda data: {k: v for k, v in data.items() if k != name}


def at(name, value):
    """The first number of an array replaced."""

    def change(data):
        rows = data[name]
        while isinstance(rows[0], list):
            rows = rows[0]
        rows[0] = value
        return data

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: [], "must have the format 'spattention-profile', got 'list'"),
        (changed(format="other"), "must have the format 'spattention-profile', got 'other'"),
        (changed(version=2), r"`version` must be 1 \(the one this library writes\), got 2"),
        (changed(version=True), "`version` must be 1 .*got True"),
        (without("first"), "a profile must have the entries"),
        (changed(more=1), "a profile must have the entries"),
        (changed(model={"name": "x"}), "`model` must have the entries"),
        (changed(edges=[0, 80]), "`edges` must be those of `length` = 80"),
        (changed(length=79), "`edges` must be those of `length` = 79"),
        (changed(length=2**40), "`length` must be an integer of at least 1, got 1099511627776"),
        (changed(length="80"), "`length` must be an integer of at least 1, got '80'"),
        (changed(tokens=3), "`tokens` must be at least `length` = 80, got 3"),
        (changed(rows=0), "`rows` must be an integer of at least 1, got 0"),
        (changed(needles=0), "`needle` must be given for at least `needles_found` needles"),
        (changed(needle=None), "`needle` must be given .*got none, needles = 3"),
        (changed(needles_found=4), "needles = 3 and needles_found = 4"),
        (
            changed(needle=None, needles=0, needles_found=0, needle_sensitivity=[[0.1] * 4] * 2),
            "`needle_sensitivity` must be None without `needle`, got values",
        ),
        (changed(digest=5), "`digest` must be a string, got 5"),
        (changed(first=[[0.5]]), r"`first` must be a tensor \[layers, heads, first tokens\]"),
        (changed(distance=[[0.5]]), r"`distance` must have the shape \[2, 4, 67\], got \[1, 1\]"),
        (changed(distance="text"), "`distance` must be nested lists of numbers"),
        (changed(distance=[[1], [1, 2]]), "`distance` must be nested lists of numbers"),
        (at("distance", "text"), "`distance` must be nested lists of numbers"),
        (at("distance", -0.1), "`distance` must hold shares from 0 to 1, got -0.1 to"),
        (at("distance", 1.5), "`distance` must hold shares from 0 to 1"),
        (at("distance", 0.9999), "the shares of a head must add up to at most 1"),
        (at("first_distance", 0.9), "`first_distance` must add up to `first` over distances"),
        (at("first_logits", float("nan")), "`first_logits` must be finite"),
        (at("needle", float("inf")), "`needle` must be finite"),
    ],
)
def test_a_damaged_file_is_named(profile, tmp_path, change, message):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(change(profile.to_dict())))
    with pytest.raises(ValueError, match=message) as raised:
        Profile.load(path)
    assert str(raised.value).startswith(f"{path} must be a profile of spattention: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a profile of spattention: Expecting value"),
        (b"\x00\xff\xfe", "must be a profile of spattention: 'utf-8' codec"),
        (b'{"format": "spattention-profile"', "must be a profile of spattention: Expecting"),
        (b"[" * 100_000, "must be a profile of spattention: "),
    ],
)
def test_a_foreign_file_is_named(tmp_path, content, message):
    path = tmp_path / "profile.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        Profile.load(path)
    assert str(path) in str(raised.value)


def test_a_missing_or_huge_file_is_named(profile, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"none\.json must be a profile, there is no such file"):
        Profile.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match="must be a profile, it is a folder"):
        Profile.load(tmp_path)
    profile.save(tmp_path / "profile.json")
    monkeypatch.setattr("spattention.fitting.profile.MOST_BYTES", 10)
    with pytest.raises(ValueError, match=r"profile\.json must have at most 10 bytes, got"):
        Profile.load(tmp_path / "profile.json")


def test_a_profile_of_another_model_is_named(profile):
    model = profile.model
    profile.check_model(ModelIdentity("elsewhere", 2, 4, 2, 31))
    for other, message in (
        (ModelIdentity("x", 3, 4, 2, 31), "it has layers = 2 .*the model x has 3"),
        (ModelIdentity("x", 2, 8, 2, 31), "it has heads = 4 .*has 8"),
        (ModelIdentity("x", 2, 4, 1, 31), "it has kv_heads = 2 .*has 1"),
        (ModelIdentity("x", 2, 4, 2, 50), "it has vocabulary = 31 .*has 50"),
    ):
        with pytest.raises(ValueError, match=message):
            profile.check_model(other)
    with pytest.raises(ValueError, match=r"`model.kv_heads` must divide `model.heads` = 4, got 3"):
        profile_of(random_weights(1, 4, 5, 0, 1.0), model=ModelIdentity("x", 1, 4, 3, 31))
    assert model.name == "made by hand"


def test_sinks_start_where_the_first_tokens_are():
    """A token with most of the attention gives its score; two equal ones give log 2 more."""
    weights = random_weights(1, 2, 30, 0, 0.0)
    logits = torch.tensor([[[5.0, 1.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0]]], dtype=torch.float64)
    first = torch.zeros(1, 2, 4, 30, dtype=torch.float64)
    first[0, 0, 0, 10], first[0, 1, :2, 10] = 0.5, 0.2
    found = profile_of(
        weights,
        first=first.sum(-1),
        first_distance=first,
        first_logits=logits,
        distance=torch.zeros(1, 2, 30, dtype=torch.float64),
    )
    assert first_scores(found).tolist() == [[5.0, pytest.approx(3.0 + 0.6931472)]]


def test_the_picture_shows_heads_by_layer(profile):
    figure = profile_figure(profile)
    titles = " ".join(axis.get_title() for axis in figure.axes)
    for words in ("where they look", "first 4 tokens", "who fetches", "what windows capture"):
        assert words in titles
    assert sum(bool(axis.images) for axis in figure.axes) >= 3
    assert profile_figure(profile_of(random_weights(1, 2, 5, 0, 1.0))) is not None


def test_sinks_take_the_place_of_first_tokens():
    """Heads that see them anyway start with a sink of next to nothing."""
    found = profile_of(random_weights(2, 4, 20, 0, 1.0))
    scores = first_scores(found)
    dense, near = ((0, 20),), ((0, 5),)
    patterns = [P((dense, near, near, dense), span=20), P((near,) * 4, span=20, prefix=1)]
    first, second = starting_sinks(found, patterns)
    torch.testing.assert_close(first, (scores[0] - torch.tensor([10, 0, 0, 10])).float())
    torch.testing.assert_close(second, (scores[1] - 10).float())
    with pytest.raises(ValueError, match="`patterns` must be one per layer, 2, got 1"):
        starting_sinks(found, patterns[:1])
