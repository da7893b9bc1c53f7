"""Experiments at tiny size: in pieces as in one go, entries, and what is refused."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from benchmarks.experiments import evidence, figures, ledger
from benchmarks.experiments import run as runner
from benchmarks.experiments.plan_files import read_plan
from benchmarks.experiments.side_by_side import side_by_side
from benchmarks.experiments.speeds import read_speeds
from spattention import baselines, hf
from spattention.choice import attention_choice
from spattention.data.token_file import write_token_file
from spattention.data.tokens import TokenStream
from spattention.data.training import open_training
from spattention.evaluation.perplexity import validation_loss
from spattention.models import preset

PLAN = """
title = "tiny"
seeds = [0]
[recipe]
model = "olmoe-tiny"
layers = 1
vocabulary = 64
data = ["train.u16.xz"]
validation = ["held.u16.xz"]
context = 32
steps = 4
batch = 2
learning_rate = 1e-2
warmup = 1
precision = "float32"
loss = "plain"
threads = 1
log_every = 1
evaluate_every = 2
save_every = 2
tensorboard = false
[[run]]
attention = "dense"
[[run]]
attention = "exclusive"
sinks = true
label = "exclusive with sinks"
[[run]]
attention = "reformer:chunk=4"
"""


def streams(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for name, documents in (("train", 40), ("held", 10)):
        made = [
            np.array([*generator.integers(0, 39, generator.integers(30, 60)), 39], np.uint16)
            for _ in range(documents)
        ]
        write_token_file(folder / f"{name}.u16.xz", TokenStream.from_documents(made), 39)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished plan, made in one go."""
    hf.register()
    baselines.register()
    folder = tmp_path_factory.mktemp("experiments")
    (folder / "tiny.toml").write_text(PLAN)
    streams(folder)
    options = runner.Options(
        (folder / "tiny.toml",), data=folder, work=folder / "work", ledger=folder / "ledger",
        commit="abc", windows=6,
    )  # fmt: skip
    assert runner.main(options)
    return options


def what_was_computed(entry):
    kept = {name: entry[name] for name in ("step", "tokens", "data", "final", "validation")}
    kept["losses"] = [(line["step"], line["loss"]) for line in entry["train"]]
    return kept


def test_entries_say_what_was_run(made):
    entries = ledger.read_ledger(made.ledger, "tiny")
    assert sorted((e["label"], e["seed"]) for e in entries) == [
        ("dense", 0),
        ("exclusive with sinks", 0),
        ("reformer:chunk=4", 0),
    ]
    for entry in entries:
        assert entry["step"] == 4
        assert entry["tokens"] == 4 * 2 * 32
        assert entry["commit"] == "abc"
        assert entry["recipe"]["steps"] == 4
        for name in ("data", "validation"):  # as the plan names them, not where they lay
            assert all("/" not in path for path in entry["recipe"][name])
        assert entry["facts"]["parameters"] > 0
        assert [line["step"] for line in entry["train"]] == [1, 2, 3, 4]
        assert [line["step"] for line in entry["validation"]] == [2, 4]
        assert entry["final"]["edges"][-1] == 32
        assert len(entry["final"]["by_position"]) == len(entry["final"]["edges"]) - 1
        # The Trainer's own last validation loss, over other windows, is near it.
        assert entry["final"]["loss"]["mean"] == pytest.approx(
            entry["validation"][-1]["eval_loss"], abs=0.2
        )
        assert entry["facts"]["pairs_per_token"] > 0
    first = {e["label"]: e["train"][0]["loss"] for e in entries if e["seed"] == 0}
    assert first["dense"] == pytest.approx(first["exclusive with sinks"], abs=0.2)


def test_models_of_finished_runs_stay(made):
    folder = made.work / "tiny" / "reformer-chunk-4-seed0"
    assert not list(folder.glob("checkpoint-*"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    entry = ledger.read_entry(made.ledger / "tiny" / "reformer-chunk-4-seed0.json")
    held = open_training([str(made.data / "held.u16.xz")], [], context=32, held_out=0.0).train
    found = validation_loss(model, held)
    assert found.loss.mean == pytest.approx(entry["final"]["loss"]["mean"], abs=0.2)
    assert model.config.reformer["chunk"] == 4


def test_pieces_give_what_one_go_gives(made, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "SMALLEST_PIECE", -math.inf)
    options = replace(made, work=tmp_path / "work", ledger=tmp_path / "ledger", minutes=0.0)
    options = replace(options, only=("dense", "reformer:chunk=4"))
    pieces = 1
    while not runner.main(options):
        entries = ledger.read_ledger(options.ledger, "tiny")
        assert entries[-1]["step"] > 0 or len(entries) > 1
        pieces += 1
        assert pieces < 60
    # A step at a time; a run's end and the first step of the next may share a piece.
    assert pieces >= 2 * 4 - 1
    found = ledger.read_ledger(options.ledger, "tiny")
    wanted = {entry["label"]: entry for entry in ledger.read_ledger(made.ledger, "tiny")}
    assert {entry["label"] for entry in found} == set(options.only)
    for other in found:
        entry = wanted[other["label"]]
        assert what_was_computed(other) == what_was_computed(entry)


def test_what_is_finished_is_not_made_again(made, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in made.ledger.rglob("*.json")}
    assert runner.main(replace(made, work=tmp_path / "nothing", minutes=0.0))
    assert {p: p.stat().st_mtime_ns for p in made.ledger.rglob("*.json")} == before


def test_a_run_that_is_killed_leaves_its_losses(made, tmp_path, monkeypatch):
    """An entry is written after every validation loss but the last, whose model is evaluated."""

    class Killed(BaseException):
        pass

    def dies(recipe, folder, options):
        raise Killed

    monkeypatch.setattr(runner, "_final", dies)
    options = replace(made, work=tmp_path / "work", ledger=tmp_path / "ledger", only=("dense",))
    with pytest.raises(Killed):
        runner.main(options)
    (entry,) = ledger.read_ledger(options.ledger, "tiny")
    assert (entry["step"], entry["final"]) == (2, None)
    assert [line["step"] for line in entry["validation"]] == [2]
    monkeypatch.undo()
    assert runner.main(options)  # the same command goes on, and ends it
    (entry,) = ledger.read_ledger(options.ledger, "tiny")
    (wanted,) = [e for e in ledger.read_ledger(made.ledger, "tiny") if e["label"] == "dense"]
    assert what_was_computed(entry) == what_was_computed(wanted)


def test_a_failed_run_stops_no_other(made, tmp_path, monkeypatch):
    """A run that fails keeps none of the others from being made."""

    def breaks(recipe, *arguments, **keywords):
        if recipe.attention == "dense":
            raise RuntimeError("out of memory")
        return pretrain(recipe, *arguments, **keywords)

    pretrain = runner.pretrain
    monkeypatch.setattr(runner, "pretrain", breaks)
    options = replace(made, work=tmp_path / "work", ledger=tmp_path / "ledger")
    options = replace(options, only=("dense", "exclusive with sinks"))
    assert not runner.main(options)
    entries = ledger.read_ledger(options.ledger, "tiny")
    assert [entry["label"] for entry in entries] == ["exclusive with sinks"]


def test_runs_side_by_side_give_what_runs_alone_give(made, tmp_path, capsys):
    options = replace(made, work=tmp_path / "work", ledger=tmp_path / "ledger", at_once=2)
    assert runner.main(replace(options, only=("dense-seed0", "reformer:chunk=4")))
    wanted = {entry["label"]: entry for entry in ledger.read_ledger(made.ledger, "tiny")}
    found = ledger.read_ledger(options.ledger, "tiny")
    assert [entry["label"] for entry in found] == ["dense", "reformer:chunk=4"]
    for entry in found:
        assert what_was_computed(entry) == what_was_computed(wanted[entry["label"]])
        assert entry["beside"] == 1
        assert figures.speed(entry) is None
        assert figures.speed(wanted[entry["label"]]) > 0
    capsys.readouterr()
    assert runner.main(replace(options, only=("dense",)))  # finished: nothing is begun
    assert "begins" not in capsys.readouterr().out
    late = replace(options, ledger=tmp_path / "other", only=("dense",), minutes=0.0)
    assert not runner.main(late)


def test_a_failed_process_stops_no_other(tmp_path, capsys):
    """A process that fails is named and keeps no other from running."""
    bad = [sys.executable, "-c", "raise SystemExit('no memory')"]
    good = [sys.executable, "-c", "print('done')"]
    commands = [("bad", bad), ("good", good)]
    assert side_by_side(commands, 1, tmp_path, None) == ["bad"]
    assert "no memory" in capsys.readouterr().out
    assert (tmp_path / "good.log").read_text() == "done\n"
    assert side_by_side(commands, 1, tmp_path / "late", 0.0) == []
    assert not list((tmp_path / "late").iterdir())


def test_another_configuration_is_refused(made, tmp_path):
    with pytest.raises(ValueError, match=r"learning_rate was 0\.01, now 0\.02"):
        runner.main(replace(made, set=("learning_rate=0.02",)))
    with pytest.raises(ValueError, match="`--only` must name runs of the plans"):
        runner.main(replace(made, only=("sparse",)))
    copied = tmp_path / "ledger"
    shutil.copytree(made.ledger, copied)
    path = copied / "tiny" / "dense-seed0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "data": "other"}))
    with pytest.raises(ValueError, match="must have had the same data"):
        ledger.read_ledger(copied, "tiny")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (("learning_rate = 1e-2", "speed = 3"), "a recipe has no field 'speed'"),
        (('attention = "reformer:chunk=4"', 'attention = "dense"'), "must name each run once"),
        (('title = "tiny"', 'titel = "tiny"'), "must have entries of"),
    ],
)
def test_wrong_plans_raise(tmp_path, change, error):
    (tmp_path / "wrong.toml").write_text(PLAN.replace(*change))
    with pytest.raises(ValueError, match=error):
        read_plan(tmp_path / "wrong.toml")


def test_plans_take_the_changes_of_a_recipe(tmp_path):
    """`--set` of plans reads values as `spattention train --set` does, bare text too."""
    (tmp_path / "tiny.toml").write_text(PLAN)
    plan = read_plan(tmp_path / "tiny.toml", ["steps=9", "precision=bfloat16", 'loss = "chunked"'])
    for run in plan.runs:
        assert (run.recipe.steps, run.recipe.precision) == (9, "bfloat16")
        assert run.recipe.loss == "chunked"
    with pytest.raises(ValueError, match="`--set` takes NAME=VALUE, got 'steps'"):
        read_plan(tmp_path / "tiny.toml", ["steps"])


def test_seeds_come_round_by_round(tmp_path):
    plan = PLAN.replace('attention = "dense"', 'attention = "dense"\nseeds = [0, 1]')
    (tmp_path / "tiny.toml").write_text(plan)
    names = [run.name for run in read_plan(tmp_path / "tiny.toml").runs]
    assert names == [
        "dense-seed0", "exclusive-with-sinks-seed0", "reformer-chunk-4-seed0", "dense-seed1"
    ]  # fmt: skip


@pytest.mark.parametrize("path", sorted(evidence.PLANS.glob("*.toml")), ids=lambda p: p.stem)
def test_committed_plans_can_be_read(path):
    plan = read_plan(path)
    assert plan.runs[0].label == "dense"
    for run in plan.runs:
        model = preset(run.fields["model"], context=run.fields["context"])
        named = run.fields["attention"]
        for text in [named] if isinstance(named, str) else named:
            attention_choice(text, model.pattern.num_heads, model.pattern.span)


def test_the_page_says_what_was_run_and_what_was_not(made, tmp_path):
    (tmp_path / "tiny.toml").write_text(
        PLAN.replace('attention = "dense"', 'attention = "dense"\nseeds = [0, 2]')
    )
    page = evidence.write(tmp_path, made.ledger, tmp_path / "docs" / "evidence.md", [])
    text = page.read_text()
    entries = {(e["label"], e["seed"]): e for e in ledger.read_ledger(made.ledger, "tiny")}
    dense = entries["dense", 0]["final"]["loss"]["mean"]
    assert f"| dense | {dense:.4f} |" in text
    assert "Not run yet: dense, seed 2." in text
    sparse = entries["reformer:chunk=4", 0]["final"]["loss"]["mean"]
    assert f"{sparse - dense:+.4f}" in text
    for name in ("tiny-tokens.png", "tiny-position.png"):
        assert (page.parent / "images" / name).read_bytes().startswith(b"\x89PNG")
        assert f"images/{name}" in text
    nothing = evidence.write(tmp_path, tmp_path / "none", tmp_path / "other.md", [])
    assert "Nothing of this was run yet." in nothing.read_text()


def entry(speeds, losses, tokens=100, step=10):
    return {
        "tokens": tokens,
        "step": step,
        "gpu": "one",
        "train": [{"tokens_per_second": speed} for speed in speeds],
        "validation": [{"step": at, "eval_loss": loss} for at, loss in losses],
    }


def test_time_is_tokens_at_the_median_speed():
    """Time is tokens at the median speed without the first line."""
    made = entry([1, 50, 40, 1000], [(5, 4.0), (10, 3.0)])
    assert figures.curve(made) == [(1.0, 4.0), (2.0, 3.0)]
    assert figures.curve(entry([1], [(5, 4.0)])) == []


def test_when_a_curve_comes_down_to_a_loss():
    points = [(1.0, 4.0), (2.0, 3.0), (3.0, 3.5), (4.0, 2.0)]
    assert figures.seconds_to(3.25, points) == 1.75
    assert figures.seconds_to(2.5, points) == pytest.approx(3 + 2 / 3)
    assert figures.seconds_to(5.0, points) == 1.0
    assert figures.seconds_to(1.0, points) is None


def test_a_faster_run_has_denses_loss_earlier():
    dense = entry([1, 50], [(5, 4.0), (10, 3.0)])
    twice = entry([1, 100], [(5, 4.0), (10, 3.0)])
    done = {("dense", 0): dense, ("half", 0): twice, ("worse", 0): entry([1, 50], [(10, 3.5)])}
    assert [evidence._time(label, done) for label in ("dense", "half", "worse")] == [
        "",
        "0.50",
        "not reached",
    ]
    done["half", 0]["gpu"] = "another"
    assert evidence._time("half", done) == ""


def finished_run(loss, pairs, gpu="one", speed=100, late=0.0):
    made = entry([1, speed], [(5, loss + 1), (10, loss)])
    return made | {
        "gpu": gpu,
        "facts": {"pairs_per_token": pairs},
        "final": {
            "loss": {"mean": loss, "error": 0.01},
            "edges": [1, 4, 6, 7, 8],
            "by_position": [loss + 1, loss + 2, loss + late, loss + late],
        },
    }


def test_speeds_of_two_kinds_of_gpu_are_never_mixed():
    done = {("dense", 0): finished_run(4.0, 8.0), ("dense", 1): finished_run(4.0, 8.0, "two", 900)}
    assert figures.reference_gpu(done) == "one"
    assert "100" in evidence._row("dense", done)
    done["other", 1] = finished_run(4.0, 8.0, "two", 900)
    assert "?" in evidence._row("other", done)
    lines = figures.time_figure(["dense", "other"], done | {("other", 0): done["dense", 0]})
    assert len(lines.axes[0].lines) == 2


def test_no_two_lines_of_a_picture_look_the_same():
    rows = [*figures.COMMON, *(f"attention {k}" for k in range(40))]
    styles = figures._styles(rows)
    assert len({tuple(style.values()) for style in styles.values()}) == len(rows)
    assert styles[rows[5]]["linestyle"] == "-"


def speeds_file(folder, name, rows, length=32, gpu="two"):
    (folder / "tiny" / "speeds").mkdir(parents=True, exist_ok=True)
    content = {
        "settings": {"model": "olmoe-tiny", "length": length},
        "environment": {"gpu": gpu, "commit": "abc"},
        "rows": [
            {
                "attention": name,
                "tokens_per_second": rate,
                # Quartiles 0.96 and 1.08: one step that the host stopped for changes neither.
                "all_seconds": [0.94, 0.96, 1.0, 1.0, 1.04, 1.08, 9.0],
            }
            for name, rate in rows.items()
        ],
    }
    (folder / "tiny" / "speeds" / f"{name}.json").write_text(json.dumps(content))


def test_measured_speeds_replace_those_of_runs(made, tmp_path):
    """Speeds that were measured apart replace those of the runs."""
    (tmp_path / "tiny.toml").write_text(PLAN)
    plan = read_plan(tmp_path / "tiny.toml")
    assert read_speeds(tmp_path, plan) is None
    speeds_file(tmp_path, "cudnn", {"dense cuDNN": 300.0, "reformer:chunk=4": 200.0})
    speeds_file(tmp_path, "flash", {"dense FlashAttention": 250.0})
    found = read_speeds(tmp_path, plan)
    assert found.rates == {"dense": 300.0, "reformer:chunk=4": 200.0}
    assert "dense attention is that of cuDNN. The middle half of one" in found.line()
    assert "spans up to 12 % of their median" in found.line()

    done = found.put({("dense", 0): finished_run(4.0, 8.0), ("gapped", 0): finished_run(4.0, 8.0)})
    assert figures.curve(done["dense", 0]) == [(5 * 10 / 300, 5.0), (10 * 10 / 300, 4.0)]
    assert figures.curve(done["gapped", 0]) == []  # not measured, and never mixed

    copied = tmp_path / "ledger"
    shutil.copytree(made.ledger, copied)
    speeds_file(copied, "cudnn", {"dense cuDNN": 300.0, "reformer:chunk=4": 200.0})
    page = evidence.write(tmp_path, copied, tmp_path / "evidence.md", []).read_text()
    assert "tokens/s, two" in page
    assert re.search(r"\| dense \|.* 300 \|", page)
    assert re.search(r"\| exclusive with sinks \|.* \? \|", page)
    assert found.line() in page

    speeds_file(tmp_path, "flash", {"dense FlashAttention": 250.0}, gpu="one")
    with pytest.raises(ValueError, match="must be of one GPU"):
        read_speeds(tmp_path, plan)
    speeds_file(tmp_path, "flash", {"dense FlashAttention": 250.0}, length=64)
    with pytest.raises(ValueError, match=r"must be of .*olmoe-tiny.* 32"):
        read_speeds(tmp_path, plan)
    speeds_file(tmp_path / "bands", "cudnn", {"gapped": 300.0})
    with pytest.raises(ValueError, match=r"must be of dense attention too, got \['gapped'\]"):
        read_speeds(tmp_path / "bands", plan)


def test_differences_are_taken_seed_by_seed():
    """Differences are taken seed by seed and against each baseline."""
    done = {
        ("dense", 0): finished_run(4.0, 8.0),
        ("dense", 1): finished_run(5.0, 8.0),
        ("shared_local", 0): finished_run(3.9, 4.0),
        ("shared_local", 1): finished_run(4.8, 4.0, late=0.4),
        ("longformer", 1): finished_run(4.7, 5.0),
        ("sliding_window", 0): finished_run(4.05, 3.0),
        ("sliding_window", 1): finished_run(4.7, 3.0),
    }
    row = evidence._row("shared_local", done)
    assert row[4:6] == ["-0.1500 ± 0.0707", "+0.0500 ± 0.2121"]
    more, less = evidence._against_baselines("shared_local", done)
    assert "`longformer`, which costs as much or more" in more
    assert "+0.1000, ahead in 0 of 1 seed, not settled" in more
    assert "`sliding_window`, which costs less: -0.0250 ± 0.1768, ahead in 1 of 2 seeds" in less


def test_entries_and_page_have_recall_and_heads(made, tmp_path):
    """Entries hold recall and heads and the page shows them."""
    for found in ledger.read_ledger(made.ledger, "tiny"):
        final = found["final"]
        assert {score["task"] for score in final["recall"]} == {"copying", "pairs"}
        assert all(score["near_chance"] in (True, False) for score in final["recall"])
        assert [len(layer["entropy"]) for layer in final["heads"]] == [8]
    (tmp_path / "tiny.toml").write_text(PLAN)
    page = evidence.write(tmp_path, made.ledger, tmp_path / "evidence.md", []).read_text()
    entropy = np.mean(final["heads"][0]["entropy"])
    assert f"| reformer:chunk=4 | {entropy:.2f} |" in page
    assert "images/tiny-time.png" in page


def test_speeds_of_several_versions_are_told_apart():
    done = {
        (label, 0): entry([1, 50, 50], [(10, 3.0)]) | {"commit": commit}
        for label, commit in (("dense", "a"), ("exclusive", "b"), ("gapped", "a"))
    }
    (line,) = evidence._versions(done)
    assert "dense, gapped (a); exclusive (b)." in line
    done["exclusive", 0]["beside"] = 1  # not shown, so nothing to tell
    assert evidence._versions(done) == []
