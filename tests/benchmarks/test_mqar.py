"""Recall at full context: what is drawn, how sequences grow, entries and their section."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.experiments import mqar, mqar_page
from benchmarks.experiments.trained_recall import answers, entry_path

TINY = mqar.Setting(
    16, "0-8+16-32", 10, tokens=256, steps=6, width=64, evaluate_every=3, items=4, warmup=1,
    start_steps=20,
)  # fmt: skip


def draw(seed: int, setting: mqar.Setting = TINY, count: int = 4, items: int = 5) -> torch.Tensor:
    return mqar.questions(setting, count, items, torch.Generator().manual_seed(seed))


def test_sequences_show_pairs_and_ask_for_each() -> None:
    """Keys and values are all different, and come again in another order, pair by pair."""
    ids = draw(0)
    assert ids.shape == (5, 16)
    for row in ids.tolist():
        first, again = (
            dict(zip(part[::2], part[1::2], strict=True)) for part in (row[:8], row[8:])
        )
        assert first == again
        assert len(set(row[:8])) == 8
        assert max(row) < TINY.length
    assert not torch.equal(ids, draw(1))
    assert torch.equal(ids, draw(0))


def test_distances_are_those_of_the_values() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 7, 8, 5, 6]])
    values, distances = answers(ids)
    assert values.tolist() == [[8, 6]]
    assert distances.tolist() == [[1, 5]]


def test_sequences_grow_when_they_are_learned() -> None:
    """A length is left when its loss is low, and at the latest after the patience."""
    large = mqar.SETTINGS["mqar-2048"]
    low, high = [torch.tensor(0.1)] * mqar.WINDOW, [torch.tensor(3.0)] * mqar.WINDOW
    assert mqar.has_grown(low, 10, large)
    assert not mqar.has_grown(high, 10, large)
    assert not mqar.has_grown(low[1:], 10, large)
    assert mqar.has_grown(high, round(large.patience * large.steps), large)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Two tiny runs, the first as if stopped, and the entries that they wrote on the way."""
    folder, written = tmp_path_factory.mktemp("ledger"), []
    for name in ("dense", "intervals:heads=0-8+16-32"):
        path = entry_path(folder, name, 0, "mqar-2048")
        path.parent.mkdir(exist_ok=True)

        def write(entry: dict, path: Path = path) -> None:
            written.append(entry["step"])
            path.write_text(json.dumps(entry))

        entry = mqar.run(TINY, name, 0, write, "abc")
    path = entry_path(folder, "dense", 0, "mqar-2048")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 3, "finished": False}))
    return folder, entry | {"written": written}


def test_entries_are_written_on_the_way(made: tuple[Path, dict]) -> None:
    folder, entry = made
    assert entry["written"] == [3, 6, 3, 6]
    assert [line["step"] for line in entry["loss"]] == [3, 6]
    assert entry["grown"] == [{"step": 3, "count": 16}]
    assert sum(part["asked"] for part in entry["by_distance"]) == 4 * 16
    path = entry_path(folder, entry["attention"], 0, "mqar-2048")
    assert mqar.is_finished(path)
    assert not mqar.is_finished(entry_path(folder, "dense", 0, "mqar-2048"))
    assert not mqar.is_finished(path.with_name("none.json"))


def test_variants_start_from_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that has learned its length gives every variant its weights, sinks apart."""
    monkeypatch.setattr(mqar, "STARTED", 100.0)
    path = tmp_path / "work" / "start.pt"
    mqar.start(TINY, 0, path)
    found = torch.load(path, weights_only=True)
    assert found["facts"]["steps"] == mqar.WINDOW
    for name in ("dense", "exclusive then dense with sinks"):
        training = mqar.Training(TINY, name, 1, 8)
        training.take(found["weights"])
        for key, weight in training.model.named_parameters():
            wanted = torch.zeros(8) if key.endswith("sinks") else found["weights"][key]
            assert torch.equal(weight, wanted)
    entry = mqar.run(TINY, "exclusive", 0, lambda entry: None, "abc", path)
    assert entry["start"] == found["facts"]
    assert entry["grown"] == []  # 16 keys are the whole length here
    del found["weights"]["lm_head.weight"]
    with pytest.raises(RuntimeError, match="must have all weights but sinks, it lacks"):
        training.take(found["weights"])
    monkeypatch.setattr(mqar, "STARTED", 0.0)
    with pytest.raises(RuntimeError, match="has not learned 8 keys in 20 steps"):
        mqar.start(TINY, 0, path)


def test_a_solved_run_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps after everything is found are not made."""
    monkeypatch.setattr(mqar, "SOLVED", 0.0)
    entry = mqar.run(TINY, "dense", 0, lambda entry: None, None)
    assert (entry["step"], entry["finished"]) == (3, True)


def test_the_section_shows_runs_and_their_absence(
    made: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, entry = made
    monkeypatch.setattr(mqar_page, "SETTINGS", {"mqar-2048": TINY})
    text = mqar_page.section(folder, "mqar-2048", tmp_path)
    assert f"| intervals:heads=0-8+16-32 | {entry['pairs']:.2f} |" in text
    assert "dense, seed 0 (stopped at step 3)" in text
    assert "shared_local:local=32" in text.split("Not run yet")[1]
    assert (tmp_path / "mqar-2048.png").read_bytes().startswith(b"\x89PNG")
    path = entry_path(folder, "exclusive", 0, "mqar-2048")
    path.write_text(json.dumps({k: v for k, v in entry.items() if k != "written"} | {"steps": 7}))
    with pytest.raises(ValueError, match="of one experiment"):
        mqar_page.read(folder, "mqar-2048")
    path.unlink()


def test_stopped_runs_stand_for_none_that_ended(
    made: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row's mean is of finished seeds; one that was stopped is named apart."""
    monkeypatch.setattr(mqar_page, "SETTINGS", {"mqar-2048": TINY})
    ended = {k: v for k, v in made[1].items() if k != "written"} | {"attention": "exclusive"}
    for seed, finished, right in ((0, False, 0.0), (1, True, 0.5), (2, True, 0.7)):
        more = {"seed": seed, "finished": finished, "accuracy": {"mean": right, "error": 0.0}}
        path = entry_path(tmp_path, "exclusive", seed, "mqar-2048")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(ended | more))
    text = mqar_page.section(tmp_path, "mqar-2048", tmp_path)
    (line,) = [line for line in text.splitlines() if line.startswith("| exclusive |")]
    assert "| 0.600 ± 0.141 |" in line
    assert line.endswith("| 2 |")
    assert "Not run yet: exclusive, seed 0 (stopped at step 6)" in text


def test_every_row_is_drawn(made: tuple[Path, dict]) -> None:
    """More rows than a palette has colours are all drawn, each in its own style."""
    names = [f"row {k}" for k in range(23)]
    axis = mqar_page.figure({name: [made[1]] for name in names}).axes[0]
    assert [line.get_label() for line in axis.lines] == names
    assert len({(line.get_color(), line.get_linestyle()) for line in axis.lines}) == len(names)


def test_entries_name_their_command(tmp_path: Path) -> None:
    """What is recorded makes the run anywhere, and names no folder."""
    options = mqar.Options("mqar-2048", ledger=tmp_path, work=tmp_path, steps=6)
    entry = {"step": 3, "seconds": 1.0, "loss": [{"loss": 1.0}], "accuracy": {"mean": 0.5}}
    mqar.write_to(options, "exclusive with sinks", 2)(entry)
    path = entry_path(tmp_path, "exclusive with sinks", 2, "mqar-2048")
    assert json.loads(path.read_text())["command"] == (
        "python -m benchmarks.experiments.mqar mqar-2048 --attention 'exclusive with sinks' "
        "--seeds 2 --steps 6"
    )


def test_settings_compare_equal_pairs() -> None:
    """Duplicated bands and the window have the pairs of the geometric bands."""
    from spattention.choice import attention_choice

    for setting in mqar.SETTINGS.values():
        if setting.variants:
            continue
        names = (mqar.BANDS, f"intervals:heads={setting.duplicated}", "shared_local:local=32")
        names += (f"sliding_window:window={setting.window}",)
        assert set(names) < set(setting.attention())
        found = [attention_choice(n, 8, setting.length).pairs(setting.length) for n in names]
        assert found == pytest.approx([found[0]] * 4, rel=2e-3)
    assert replace(setting, count=4).length == 16
