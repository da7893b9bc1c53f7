"""Killed at any moment, a run goes on with the losses that it would have had."""

import json
import multiprocessing
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from spattention import hf
from spattention.data.token_file import write_token_file
from spattention.data.tokens import TokenStream
from spattention.training.checkpoints import checkpoints, newest_good
from spattention.training.lock import held
from spattention.training.metrics import METRICS, read_metrics
from spattention.training.pretrain import pretrain

sys.path.insert(0, str(Path(__file__).parent))
from small_run import STEPS, killed, losses, recipe

PLACES = [
    "while the weights are written",
    "before the checkpoint is listed",
    "before it is renamed",
    "before old ones are removed",
    "between two steps",
]


def kill(data, folder, where, **changes):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["spattention.training.pretrain"])
    process = context.Process(target=killed, args=(data, folder, where, changes))
    process.start()
    process.join(120)
    assert process.exitcode == -9


@pytest.mark.parametrize("where", PLACES)
def test_a_killed_run_goes_on_bitwise(data, whole, tmp_path, where):
    folder = tmp_path / "run"
    kill(data, folder, where)
    before = losses(folder)
    assert 0 < len(before) < len(losses(whole))
    assert pretrain(recipe(data), folder).finished
    assert losses(folder) == losses(whole)
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        last = f"checkpoint-{STEPS}"
        assert (folder / last / name).read_bytes() == (whole / last / name).read_bytes()
    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}, "no leftovers"


def test_bfloat16_continues_bitwise_with_workers(data, tmp_path):
    changes = {"precision": "bfloat16", "loss": "chunked"}
    assert pretrain(recipe(data, **changes), tmp_path / "whole").finished
    kill(data, tmp_path / "run", "between two steps", **changes)
    assert pretrain(recipe(data, **changes, workers=1), tmp_path / "run").finished
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_checkpoint_is_a_model_with_its_pattern(data, whole):
    hf.register()
    model = AutoModelForCausalLM.from_pretrained(whole / f"checkpoint-{STEPS}")
    assert model.config.spattention["patterns"][0]["span"] == 32
    assert model.config.eos_token_id == 7
    assert model.config.use_cache
    assert not model.config.output_router_logits
    tokens = model.generate(torch.tensor([[9, 10, 11]]), max_new_tokens=4, min_new_tokens=4)
    assert tokens.shape == (1, 7)


def test_the_last_k_are_kept_without_unread_pickles(whole):
    assert [p.name for p in checkpoints(whole)] == ["checkpoint-8", "checkpoint-6"]
    assert not list(whole.rglob("training_args.bin"))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda p: (p / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda p: (p / "model.safetensors").open("ab").write(b"x"), "must have"),
        (lambda p: _flip(p / "model.safetensors"), "was changed since it was written"),
        (lambda p: (p / "manifest.json").unlink(), "cannot be read"),
        (lambda p: (p / "manifest.json").write_text("{}"), "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_yields_to_the_one_before(data, whole, tmp_path, damage, problem):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    damage(folder / f"checkpoint-{STEPS}")
    good, problems = newest_good(folder)
    assert good == folder / "checkpoint-6"
    assert len(problems) == 1
    assert problem in problems[0]
    assert f"checkpoint-{STEPS}" in problems[0]


def test_a_run_goes_on_from_before_the_damage(data, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    _flip(folder / "checkpoint-8" / "optimizer.pt")
    events = []
    assert pretrain(recipe(data), folder, send=events.append).finished
    notes = [event["text"] for event in events if event["kind"] == "note"]
    assert len(notes) == 2
    assert "checkpoint-8/optimizer.pt was changed" in notes[0]
    assert notes[1] == f"resuming from {folder / 'checkpoint-6'}"
    assert losses(folder) == losses(whole)
    assert (folder / "damaged-checkpoint-8").exists()


def test_another_recipe_or_other_data_does_not_go_on(data, whole, tmp_path):
    with pytest.raises(ValueError, match="holds a run of another recipe \\(batch was 2, now 4\\)"):
        pretrain(recipe(data, batch=4), whole)
    other = tmp_path / "b.u16.xz"
    write_token_file(other, TokenStream.from_documents([np.full(800, 9, np.uint16)] * 3), 7)
    with pytest.raises(ValueError, match="the data is another"):
        pretrain(recipe(other), whole)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="must be a new or empty folder"):
        pretrain(recipe(data), tmp_path / "full")


def test_held_out_data_stay_held_out_on_resume(tmp_path):
    """The same streams, but one of them on the other side; and tokens in the middle of one."""
    paths = []
    for seed in range(3):
        paths.append(tmp_path / f"{seed}.u16.xz")
        tokens = np.random.default_rng(seed).integers(8, 320, 12_000).astype(np.uint16)
        write_token_file(
            paths[-1], TokenStream.from_documents([np.append(tokens, np.uint16(7))]), 7
        )
    a, b, c = map(str, paths)

    def go(trained, judged):
        made = replace(recipe(paths[0], validation=judged, held_out=0.0), data=tuple(trained))
        return pretrain(made, tmp_path / "run", minutes=0)

    go([a, b], [c])
    with pytest.raises(ValueError, match="the data is another"):
        go([a], [b, c])
    tokens[5000:6000] = 8
    write_token_file(paths[2], TokenStream.from_documents([np.append(tokens, np.uint16(7))]), 7)
    with pytest.raises(ValueError, match="the data is another"):
        go([a, b], [c])


def test_intervals_follow_the_recipe_on_resume(data, tmp_path):
    folder = tmp_path / "run"
    pretrain(recipe(data, save_every=2, log_every=1, evaluate_every=4), folder, minutes=0)
    changes = {"save_every": 5, "log_every": 4, "evaluate_every": 3, "keep": 10}
    assert pretrain(recipe(data, **changes), folder).finished
    assert [p.name for p in checkpoints(folder)] == ["checkpoint-8", "checkpoint-5", "checkpoint-1"]
    judged = [e["step"] for e in read_metrics(folder / METRICS) if "eval_loss" in e]
    assert judged == [3, 6, 8]


def test_two_processes_do_not_train_in_one_folder(data, tmp_path):
    with held(tmp_path / "run"), pytest.raises(ValueError, match="another one is at work in"):
        pretrain(recipe(data), tmp_path / "run")
    assert pretrain(recipe(data, steps=1), tmp_path / "run").finished


def test_damage_at_the_same_step_again(data, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "checkpoint-mine").mkdir()
    for _ in range(2):
        weights = folder / f"checkpoint-{STEPS}" / "model.safetensors"
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 255]))
        assert pretrain(recipe(data), folder).finished
        assert losses(folder) == losses(whole)
    aside = sorted(p.name for p in folder.glob("damaged-*"))
    assert aside == [f"damaged-checkpoint-{STEPS}", f"damaged-checkpoint-{STEPS}-2"]
    assert (folder / "checkpoint-mine").is_dir()


def test_a_time_limit_saves_and_the_same_call_goes_on(data, whole, tmp_path):
    folder = tmp_path / "run"
    outcome = pretrain(recipe(data), folder, minutes=0)
    assert not outcome.finished
    assert outcome.step == 1
    assert checkpoints(folder)[0].name == "checkpoint-1"
    assert pretrain(recipe(data), folder).finished
    assert losses(folder) == losses(whole)


def test_a_finished_run_stays_as_it_was(data, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    outcome = pretrain(recipe(data), folder, command="another")
    assert (outcome.finished, outcome.step) == (True, STEPS)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    (folder / "losses.json").unlink()  # killed before it was written
    assert pretrain(recipe(data), folder).finished
    assert json.loads((folder / "losses.json").read_text())["step"] == STEPS


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
