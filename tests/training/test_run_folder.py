"""Damaged, foreign and locked files of a run: refused before it continues, by name."""

import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spattention.cli import main
from spattention.files import is_unfinished, read_json, write_atomically
from spattention.training import load
from spattention.training.checkpoints import checkpoints, newest_good
from spattention.training.loss import check_loss
from spattention.training.metrics import METRICS, append_metrics, read_metrics
from spattention.training.pretrain import pretrain
from spattention.training.record import LOSSES
from spattention.training.run_folder import MARK

sys.path.insert(0, str(Path(__file__).parent))
from small_run import STEPS, losses, recipe


@pytest.fixture
def folder(whole, tmp_path):
    """A finished run that lost its last checkpoint: the next call continues from step 6."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / f"checkpoint-{STEPS}")
    return tmp_path / "run"


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def insert(path, line):
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], line, *lines[3:]]) + "\n")


def repeat(path):
    """The first line again, as if two files had been joined."""
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], *lines]))


def turn(path):
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))


def snapshot(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda d: (d / MARK).write_text("[]"), "run.json must hold a JSON object, got list"),
        (lambda d: (d / MARK).write_text("{}"), "run.json must hold `version`, a JSON int"),
        (lambda d: (d / MARK).write_bytes(b"\xff"), "run.json must hold a JSON object: "),
        (lambda d: (d / MARK).write_text("[" * 99_999), "run.json must hold a JSON object: "),
        (lambda d: (d / MARK).write_text(" " * 2**20 + "{}"), "must have at most 1048576 bytes"),
        (lambda d: change(d / MARK, recipe=[]), "must hold `recipe`, a JSON object, as"),
        (lambda d: change(d / MARK, data=1), "must hold `data`, a JSON str, as"),
        (lambda d: change(d / MARK, version=2), "run.json must have the version 1, got 2"),
        (lambda d: change(d / MARK, data="0" * 16), "the data is another"),
        (lambda d: (d / LOSSES).write_text("{}"), "losses.json must hold `step`, an integer"),
        (lambda d: (d / LOSSES).write_text("cut o"), "losses.json must hold a JSON object: "),
        (lambda d: change(d / LOSSES, train={}), "must hold `train`, a list of objects with"),
        (lambda d: change(d / LOSSES, validation=[3]), "must hold `validation`, a list of"),
        (lambda d: insert(d / METRICS, '{"step": 5, "lo'), "metrics.jsonl, line 4, must be a JSON"),
        (lambda d: insert(d / METRICS, '{"loss": 1.5}'), "line 4, must be a JSON object with an"),
        (lambda d: insert(d / METRICS, "[" * 99_999), "metrics.jsonl, line 4, must be a JSON"),
        (lambda d: insert(d / METRICS, "\0" * 2**21), "metrics.jsonl, line 4, must be a JSON"),
        (lambda d: repeat(d / METRICS), "metrics.jsonl, line 2, must not hold `loss` of step 1 "),
        (lambda d: turn(d / METRICS), "must not have a step before 8, the one above it, got "),
        (
            lambda d: insert(d / METRICS, '{"step": 3, "a": 1}'),
            "line 4, must hold one of [",
        ),
        (lambda d: insert(d / METRICS, '{"step": 3, "loss": "1"}'), "line 4, must hold one of ["),
        (lambda d: insert(d / METRICS, '{"step": 9, "loss": 1.0}'), "line 5, must not have a step"),
    ],
)
def test_damaged_files_stop_a_run_and_stay(folder, data, damage, error):
    """Refused before anything is written: what is there can be looked at and mended."""
    damage(folder)
    before = snapshot(folder)
    with pytest.raises(ValueError, match=re.escape(error)) as caught:
        pretrain(recipe(data), folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert snapshot(folder) == before


def test_a_damaged_line_costs_no_other(folder, data, whole):
    """Once it is removed, as the message says, every other line stays; `losses.json` keeps the
    record of its step.
    """
    path = folder / METRICS
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3][:20], *lines[4:]]) + "\n")
    with pytest.raises(ValueError, match=r"line 4, .* remove that line to continue"):
        pretrain(recipe(data), folder)
    path.write_text("\n".join([*lines[:3], *lines[4:]]) + "\n")
    assert pretrain(recipe(data), folder).finished
    del (expected := read_metrics(whole / METRICS))[3]
    assert [(e["step"], *e) for e in read_metrics(path)] == [(e["step"], *e) for e in expected]
    kept, all_of_them = (json.loads((d / LOSSES).read_text()) for d in (folder, whole))
    for kind in ("train", "validation"):
        assert [e["step"] for e in kept[kind]] == [e["step"] for e in all_of_them[kind]]


def test_lost_metrics_do_not_empty_the_record(folder, data, whole):
    (folder / METRICS).unlink()
    assert pretrain(recipe(data), folder).finished
    found, expected = (json.loads((d / LOSSES).read_text())["train"] for d in (folder, whole))
    assert [(e["step"], e["loss"]) for e in found] == [(e["step"], e["loss"]) for e in expected]


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / METRICS
    append_metrics(path, {"step": 1, "loss": 2.0})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    assert read_metrics(tmp_path / "none") == []


def test_a_file_for_a_folder_and_the_reverse(data, tmp_path, folder):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"`--output` must be a folder, .*file is a file"):
        pretrain(recipe(data), tmp_path / "file")
    (folder / MARK).unlink()
    (folder / MARK).mkdir()
    with pytest.raises(ValueError, match=r"run\.json must be a file .*, it is a folder"):
        pretrain(recipe(data), folder)


def test_a_run_without_permission_is_named(open_folder, unprivileged, data, capsys):
    shutil.copytree(data.parent, open_folder / "data")
    (open_folder / "data").chmod(0o755)
    (open_folder / "locked").mkdir(mode=0o555)
    for path in (open_folder / "data").rglob("*"):
        path.chmod(0o644)
    with unprivileged(), pytest.raises(PermissionError, match="locked"):
        pretrain(recipe(open_folder / "data" / data.name), open_folder / "locked" / "run")
    (open_folder / "data" / data.name).chmod(0)
    with unprivileged(), pytest.raises(PermissionError, match=data.name):
        pretrain(recipe(open_folder / "data" / data.name), open_folder / "run")
    assert not (open_folder / "run").exists()


@pytest.mark.parametrize(
    ("size", "every", "error"),
    [
        (2000, 8, r"losses\.json cannot be read or written: .*File too large"),
        (20_000, 2, r"checkpoint-2 cannot be written, with [\d,]+ bytes free: "),
        (1_000_000, 2, r"checkpoint-2 cannot be written, with [\d,]+ bytes free: "),
    ],
)
def test_a_full_disk_is_named_and_leaves_no_part(
    data, whole, tmp_path, full_disk, size, every, error
):
    """The run stops in one line, and with room it continues."""
    with full_disk(size), pytest.raises(OSError, match=error) as caught:
        pretrain(recipe(data, save_every=every), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert {p.name for p in (tmp_path / "run").iterdir()} <= {MARK, METRICS}
    assert pretrain(recipe(data), tmp_path / "run").finished
    assert losses(tmp_path / "run") == losses(whole)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_under_metrics_is_named():
    with pytest.raises(OSError, match=r"/dev/full cannot be read or written: .*No space left"):
        append_metrics(Path("/dev/full"), {"step": 1})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", bytes(100)),
        ("config.json", b"[]"),
        ("config.json", b"{}"),
        ("config.json", b'{"model_type": "olmoe", "num_attention_heads": 0}'),
        ("config.json", b"{"),
    ],
)
def test_a_damaged_pretrained_model_is_named(data, whole, tmp_path, name, content):
    shutil.copytree(whole / f"checkpoint-{STEPS}", tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(content)
    changes = {"model": str(tmp_path / "model"), "layers": None, "vocabulary": None}
    with pytest.raises(ValueError, match=r"`model` must be .* got '.*model': .") as caught:
        pretrain(recipe(data, **changes), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_a_kill_left_unfinished_is_removed(data, folder):
    for name in (".run.json.x.unfinished", ".losses.json.y.unfinished"):
        (folder / name).write_text("{")
    (folder / ".mine").write_text("stays")
    assert pretrain(recipe(data), folder).finished
    assert not [p for p in folder.iterdir() if is_unfinished(p)]
    assert (folder / ".mine").exists()


def test_a_first_kill_does_not_block_the_folder(data, tmp_path):
    """A process killed while it writes `run.json` leaves that file's unfinished copy alone."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json.x.unfinished").write_text("{")
    assert pretrain(recipe(data, steps=1), tmp_path / "run").finished


def test_files_are_flushed_before_they_are_renamed(tmp_path, monkeypatch):
    """The file is flushed before it is renamed, the folder after."""
    calls = []
    flush, replace = os.fsync, os.replace

    def flushed(handle):
        calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        flush(handle)

    def replaced(old, new):
        calls.append(("replace", Path(new).name))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", replaced)
    write_atomically(tmp_path / "a.json", "{}")
    assert [kind for kind, _ in calls] == ["fsync", "replace", "fsync"]
    assert [name for _, name in calls[1:]] == ["a.json", tmp_path.name]


def test_a_model_larger_than_the_memory_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "_memory", lambda device: 2**20)
    with pytest.raises(ValueError, match=r"that fits into the 0\.0 GiB of cpu; olmoe-tiny with 1"):
        pretrain(recipe(data), tmp_path / "run")
    monkeypatch.undo()
    big = {"layers": 1024, "model": "olmoe-1b-7b", "vocabulary": 2**20}
    with pytest.raises(
        ValueError, match=r"must make a model that fits into .* 1,048,576|parameters"
    ):
        pretrain(recipe(data, **big), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_minutes_must_be_a_number(data, tmp_path):
    for minutes in (float("nan"), -1.0, float("inf")):
        with pytest.raises(ValueError, match="`minutes` must be finite and not negative, got"):
            pretrain(recipe(data), tmp_path / "run", minutes=minutes)


def test_the_code_of_a_model_folder_is_never_run(data, tmp_path):
    """Nor is a person asked: Transformers' default offers it on a terminal."""
    (tmp_path / "model").mkdir()
    config = {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    changes = {"model": str(tmp_path / "model"), "layers": None, "vocabulary": None}
    for attention in ("dense", "shared_local"):
        with pytest.raises(ValueError, match=r"`model` must be one of .* custom code"):
            pretrain(recipe(data, **changes, attention=attention), tmp_path / "run")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: (c / "model.safetensors").write_bytes(b""),
        lambda c: (c / "model.safetensors").write_bytes(bytes(100)),
        lambda c: (c / "optimizer.pt").write_bytes(b"PK"),
        lambda c: (c / "config.json").write_text("[]"),
        lambda c: (c / "manifest.json").write_text("[]"),
        lambda c: (c / "manifest.json").write_text('{"files": {"a": 3}}'),
        lambda c: (c / "manifest.json").write_text("[" * 99_999),
        lambda c: shutil.rmtree(c),
    ],
)
def test_damage_is_returned_with_the_older_checkpoint(whole, tmp_path, edit):
    """The call that finds a checkpoint returns what is wrong with newer ones, by file."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    newest = run / f"checkpoint-{STEPS}"
    edit(newest)
    good, problems = newest_good(run)
    assert good == run / "checkpoint-6"
    if newest.exists():
        assert len(problems) == 1
        assert str(newest) in problems[0]
    else:
        assert problems == []


def test_json_is_read_within_its_limit(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    with pytest.raises(ValueError, match=r"a\.json must have at most 7 bytes, got 8"):
        read_json(tmp_path / "a.json", 7)
    with pytest.raises(ValueError, match=r"b\.json must be a file .*, it is missing"):
        read_json(tmp_path / "b.json")


def test_the_command_refuses_a_recipe_in_one_line(tmp_path, capsys, data):
    (tmp_path / "r.toml").write_text("a = " + "[" * 50_000 + "]" * 50_000)
    assert main(["train", str(tmp_path / "r.toml")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'r.toml'} must be a recipe in TOML")
    assert "Traceback" not in said
    assert torch.get_num_threads() == 1
    assert not checkpoints(tmp_path)


def test_a_finished_run_does_not_say_that_it_resumes(data, whole):
    """Nothing is left to train, and the note names the checkpoint of the last step."""
    events = []
    assert pretrain(recipe(data), whole, send=events.append).finished
    notes = [event["text"] for event in events if event["kind"] == "note"]
    assert notes == [f"all {STEPS} steps are done: {whole / f'checkpoint-{STEPS}'}"]


def test_a_finished_run_says_how_to_train_longer(data, whole, tmp_path):
    """Its schedule ends with its steps; a new run starts from its weights."""
    last = whole / f"checkpoint-{STEPS}"
    with pytest.raises(ValueError, match=f"`--set model={last}` starts a new run"):
        pretrain(recipe(data, steps=STEPS + 2), whole)
    with pytest.raises(ValueError, match=r"name another folder$"):
        pretrain(recipe(data, steps=STEPS - 2), whole)
    # The recipe of the finished run, with its `layers` and `vocabulary`.
    assert pretrain(recipe(data, model=str(last), steps=1), tmp_path / "more").finished
    before, after = losses(whole)[-1][1], losses(tmp_path / "more")[-1][1]
    assert after == pytest.approx(before, abs=0.5)


def test_a_run_as_model_names_its_checkpoint(data, whole, tmp_path, capsys):
    path = tmp_path / "r.toml"
    fields = recipe(data).to_dict().items()
    path.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in fields if v is not None))
    command = ["train", str(path), "--set", f"model={whole}", "--output", str(tmp_path / "more")]
    assert main(command) == 2
    last = whole / f"checkpoint-{STEPS}"
    assert f"{whole} is a training run: name one of its checkpoints, such as {last}" in (
        capsys.readouterr().err
    )
    assert main(["fit", str(whole), "--output", str(tmp_path / "more")]) == 2
    assert f"`MODEL` must be a saved model, {whole} is a training run" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()


def test_a_loss_for_gpus_is_refused_before_the_model(data, tmp_path, monkeypatch):
    monkeypatch.setattr("spattention.training.pretrain.load_model", None)
    monkeypatch.setattr("spattention.training.pretrain.open_training", None)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='`loss` must be "chunked" or "plain" on the CPU'):
            pretrain(recipe(data, loss="liger"), tmp_path / "run")
    monkeypatch.setattr("spattention.training.loss.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="needs liger-kernel"):
        check_loss("liger", torch.device("cuda"))
    assert not (tmp_path / "run").exists()


def test_what_is_hardly_meant_is_noted(data, tmp_path):
    said = []
    changes = {"vocabulary": None, "steps": 1, "attention": "shared_local:widths=geometric"}
    pretrain(recipe(data, **changes), tmp_path / "run", send=said.append)
    notes = [event["text"] for event in said if event["kind"] == "note"]
    assert any("tokens below 320, and the model's embedding 4,096 entries" in n for n in notes)
    assert any("geometric attends all distances: this is dense attention" in n for n in notes)
    begin = next(event for event in said if event["kind"] == "begin")
    assert begin["threads"] == 1
    assert json.loads((tmp_path / "run" / LOSSES).read_text())["facts"]["threads"] == 1
    said.clear()
    pretrain(recipe(data, steps=1), tmp_path / "quiet", send=said.append)
    assert not [event for event in said if event["kind"] == "note"]


def test_a_long_run_on_a_cpu_is_noted(data, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("spattention.training.pretrain.CPU_SPEED", 1.0)
    pretrain(recipe(data, steps=1), tmp_path / "run", send=said.append)
    notes = [event["text"] for event in said if event["kind"] == "note"]
    assert (torch.cuda.is_available() and not notes) or "days or more on the CPU" in notes[0]


@pytest.mark.parametrize("field", ["data", "validation"])
@pytest.mark.parametrize("name", ["gone", "gone.u16.xz"])
def test_missing_data_is_named_by_its_field(data, tmp_path, field, name):
    where = tmp_path / name
    with pytest.raises(ValueError, match=rf"`{field}` must be .*, got {where}, which does not exi"):
        pretrain(replace(recipe(data), **{field: (str(where),)}), tmp_path / "run")


@pytest.mark.parametrize(
    ("at", "said"), [(1, "Interrupted before the first checkpoint in"), (3, "resumes from")]
)
def test_an_interrupted_run_says_how_to_resume(data, tmp_path, monkeypatch, capsys, at, said):
    def interrupt(self, event):
        if event == {"kind": "step", "step": at}:
            raise KeyboardInterrupt

    monkeypatch.setattr("spattention.cli.train.TrainProgress.update", interrupt)
    path = tmp_path / "r.toml"
    path.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in recipe(data).to_dict().items()
                            if v is not None))  # fmt: skip
    assert main(["train", str(path), "--output", str(tmp_path / "run")]) == 130
    told = capsys.readouterr()
    assert said in told.out.replace("\n", " ")
    assert told.err == "interrupted\n"
