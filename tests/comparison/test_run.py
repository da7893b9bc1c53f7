"""Runs of a comparison: equal data, memory of their own, failures that reach the parent."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig

from spattention import BandPattern
from spattention.choice import attention_choice
from spattention.comparison import run as run_module
from spattention.comparison.folder import ResultsFolder
from spattention.comparison.memory import resident_bytes
from spattention.comparison.plan import Run
from spattention.comparison.process import RunFailed, show_one_gpu, train_in_process
from spattention.comparison.run import train
from spattention.data.prepare import open_facts, open_stream, prepare
from spattention.data.token_file import write_token_file
from spattention.data.tokens import TokenStream
from spattention.models import build, preset
from spattention.training import load, pretrain
from spattention.training.callbacks import Diverged


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    text = folder / "text.txt"
    words = np.random.default_rng(0).choice(["one", "two", "three", "four"], 4000)
    text.write_text("\f".join(" ".join(part) for part in np.split(words, 20)))
    return folder / "out", prepare(folder / "out", text, vocabulary=300, held_out=0.1)


def job(data, output, attention="dense", seed=0, **changes):
    """A run and the folder of its comparison, with the data in place."""
    source, facts = data
    folder = ResultsFolder(output)
    if not folder.data.exists():
        shutil.copytree(source, folder.data)
    values = {
        "model": "olmoe-tiny",
        "layers": 1,
        "vocabulary": facts.vocabulary,
        "data": [str(folder.data)],
        "context": 32,
        "batch": 2,
        "micro_batch": 2,
        "steps": 5,
        "learning_rate": 1e-2,
        "warmup": 1,
        "precision": "float32",
        "loss": "plain",
        "balance_loss": 0,
        "z_loss": 0,
        "log_every": 1,
        "evaluate_every": 3,
        "save_every": 3,
        "keep": 1,
        "validation_windows": 4,
        "threads": 1,
        "tensorboard": False,
        "attention": attention,
        "seed": seed,
    }
    (output / "comparison.json").write_text("{}")
    return Run(attention, seed, values | changes), folder


def test_variants_share_data_and_seeds_do_not(data, tmp_path):
    runs = {
        key: train(*job(data, tmp_path, *key), lambda event: None)
        for key in (("dense", 0), ("exclusive", 0), ("exclusive", 1))
    }
    assert runs["dense", 0].order == runs["exclusive", 0].order
    assert runs["exclusive", 0].order != runs["exclusive", 1].order
    assert runs["dense", 0].validation_loss != runs["exclusive", 0].validation_loss
    assert runs["exclusive", 0].pairs == 32 * 33 // 2
    assert runs["dense", 0].pairs == 8 * 32 * 33 // 2


def test_a_step_has_as_many_windows_as_it_says(data, tmp_path, monkeypatch):
    """Also where the data have fewer: every step has as many windows, epoch after epoch."""
    seen = []

    class Spy(pretrain.InOrder):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    monkeypatch.setattr(pretrain, "InOrder", Spy)
    train(*job(data, tmp_path, batch=256, micro_batch=256, steps=2), lambda event: None)
    assert sorted(seen) == list(range(512))


def test_a_run_reports_and_ends_with_a_validation_loss(data, tmp_path):
    events = []
    result = train(*job(data, tmp_path), events.append)
    assert [e["step"] for e in events if e["kind"] == "step"] == [1, 2, 3, 4, 5]
    assert [step for step, _ in result.validation_losses] == [3, 5]
    assert result.validation_loss == result.validation_losses[-1][1]
    assert result.train_losses[-1][1] < result.train_losses[0][1]
    assert result.continuation
    model = tmp_path / "models" / "dense-seed0"
    names = {file.name for file in model.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "losses.json"}
    assert "optimizer.pt" not in names


def test_speed_is_that_of_the_median_step(monkeypatch):
    """Steps take one second each, after three slow ones; what lies between them does not count."""
    clock = run_module.StepClock()
    now = [0.0]
    monkeypatch.setattr(run_module.time, "perf_counter", lambda: now[0])
    for cost in (9.0, 8.0, 7.0, 1.0, 1.0, 5.0):
        clock.on_step_begin()
        now[0] += cost
        clock.on_step_end()
        now[0] += 100.0
    assert clock.median == 1.0
    assert run_module.StepClock().median is None


def test_packed_tokens_name_the_end_of_text(data, tmp_path):
    folder, _ = data
    stream = open_stream(folder, "train")
    swapped = TokenStream(
        np.array([9, *range(1, 9), 0, *range(10, 300)], np.uint16)[stream.tokens], stream.starts
    )
    write_token_file(tmp_path / "t.u16.xz", swapped, end_of_text=9)
    known = Tokenizer.from_file(str(folder / "tokenizer.json"))
    known.save(str(tmp_path / "tokenizer.json"))
    for name, end, tokenizer in (
        ("described", None, tmp_path / "tokenizer.json"),
        ("named", 9, None),
    ):
        facts = prepare(
            tmp_path / name,
            tmp_path / "t.u16.xz",
            vocabulary=0,
            held_out=0.1,
            tokenizer=tokenizer,
            end_of_text=end,
        )
        assert open_facts(tmp_path / name) == facts
        run, folder = job((tmp_path / name, facts), tmp_path / "compared" / name, steps=1)
        train(run, folder, lambda event: None)
        model = folder.models / run.name
        config = GenerationConfig.from_pretrained(model)
        assert config.eos_token_id == facts.end_of_text == 9
        if tokenizer:
            saved = AutoTokenizer.from_pretrained(model)
            assert (saved.eos_token_id, len(saved)) == (9, known.get_vocab_size())


def test_a_run_apart_gives_the_same_losses(data, tmp_path):
    here = train(*job(data, tmp_path / "here", "exclusive"), lambda event: None)
    apart = train_in_process(*job(data, tmp_path / "apart", "exclusive"), lambda event: None)
    assert apart.validation_loss == pytest.approx(here.validation_loss, rel=1e-5)
    assert apart.order == here.order
    if apart.memory_peak is not None:
        assert apart.memory_peak > apart.memory_before > 0


def test_a_failure_in_the_process_reaches_the_parent(data, tmp_path):
    with pytest.raises(RunFailed, match=r"(?s)dense-seed0 failed:.*at most the number of valid"):
        train_in_process(*job(data, tmp_path, context=2**20), lambda event: None)


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, monkeypatch):
    def poisoned(*arguments, **keywords):
        model = build(*arguments, **keywords)
        next(model.parameters()).data.fill_(float("nan"))
        return model

    monkeypatch.setattr(load, "build", poisoned)
    with pytest.raises(Diverged, match="became nan"):
        train(*job(data, tmp_path), lambda event: None)


def test_a_stopped_run_continues_exactly(data, tmp_path):
    """Losses, and the digest of all tokens, are those of a run that nobody stopped."""

    def stop(event):
        if event["kind"] == "step" and event["step"] == 4:
            raise KeyboardInterrupt

    whole = train(*job(data, tmp_path / "whole"), lambda event: None)
    with pytest.raises(KeyboardInterrupt):
        train(*job(data, tmp_path / "stopped"), stop)
    run, folder = job(data, tmp_path / "stopped")
    assert (folder.training / run.name / "checkpoint-3").is_dir()
    steps = []
    found = train(run, folder, lambda event: steps.append(event.get("step")))
    assert min(step for step in steps if step) >= 3
    assert found.order == whole.order
    assert found.validation_losses == whole.validation_losses
    assert found.train_losses == whole.train_losses


def test_peak_memory_counts_what_was_freed_again():
    """In a process of its own: of a large one the system may take pages away meanwhile."""
    if resident_bytes() is None:
        pytest.skip("this system does not tell the resident set")
    code = (
        "import numpy as np\n"
        "from spattention.comparison.memory import peak_resident_bytes, resident_bytes\n"
        "before = resident_bytes()\n"
        "block = np.ones(2**26, np.uint8)\n"
        "del block\n"
        "assert peak_resident_bytes() >= before + 2**25\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_choices_name_patterns_and_their_options():
    bands = attention_choice("shared_local:widths=geometric,local=4", 8, 64)
    assert bands.pattern.recipe["local"] == 4
    edges = attention_choice("shared_local:widths=0/8/64,local=4/64", 2, 64)
    assert edges.pattern == BandPattern.shared_local(2, 64, widths=[0, 8, 64], local=[4, 64])
    assert attention_choice("sliding_window", 8, 64).pairs(64) == 8 * (9 * 10 // 2 + 55 * 9)
    all_heads = ((0, 8), (16, 32))
    written = attention_choice("intervals:heads=0-8+16-32,prefix=2", 3, 64)
    assert written.pattern == BandPattern([all_heads] * 3, 64, prefix=2)
    written = attention_choice("intervals:heads=0-8+16-32/none/0-4", 3, 64)
    assert written.pattern == BandPattern([all_heads, (), ((0, 4),)], 64)
    model = build(preset("olmoe-tiny", vocab_size=64, context=64, num_layers=1), pattern=None)
    bands.apply(model)
    assert model.config._attn_implementation == "spattention"
    attention_choice("dense", 8, 64).apply(model := build(preset("olmoe-tiny"), pattern=None))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("spiral", "a pattern must be one of .* got 'spiral'"),
        ("shared_local:lokal=3", "NAME=VALUE with a name of .* got 'lokal=3'"),
        ("exclusive:geometric", "NAME=VALUE with a name of .* got 'geometric'"),
        ("sliding_window:window=65", "`window` must be between 1 and `span` = 64, got 65"),
        ("dense:window=3", "NAME=VALUE with a name of"),
        ("exclusive:", "NAME=VALUE with a name of .* got ''"),
        (
            "exclusive:widths=0",
            r"option `widths` of `exclusive` must be one of \(.*\), .*, got '0'",
        ),
        (
            "shared_local:local=1.5",
            "option `local` of `shared_local` must be an integer, got '1.5'",
        ),
        ("exclusive:widths=geometric,first=²", "option `first` .* must be an integer, got '²'"),
        ("shared_local:local=1,local=2", "option `local` of `shared_local` must be given once"),
        ("shared_local:local=-1", "`local` must not be negative, got -1"),
        ("shared_local:local=1/2", r"`local` must be one size or one per head \(8\), got 2"),
        ("exclusive:widths=0/64", "`widths` must hold .*= 9 edges, got 2"),
        ("exclusive:widths=0//64", r"`widths` .* must be one of .*, got '0//64'"),
        ("sliding_window:window=1/2", "option `window` .* must be an integer, got '1/2'"),
        ("intervals", "`intervals` must have the option `heads`"),
        ("intervals:heads=0-8/0-8", "must have the intervals of one head or of all 8, got 2"),
        ("intervals:heads=8", "option `heads` of `intervals` must be intervals as in .*, got '8'"),
        ("intervals:local=8", "NAME=VALUE with a name of .*'heads', 'prefix'.* got 'local=8'"),
    ],
)
def test_choices_refuse(text, error):
    with pytest.raises(ValueError, match=error):
        attention_choice(text, 8, 64)


@pytest.mark.parametrize(
    ("seen", "left"), [(None, "0"), ("0", "0"), ("2,3", "2"), ("GPU-a,GPU-b", "GPU-a"), ("", "")]
)
def test_a_run_sees_the_first_gpu_of_its_user(seen, left, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    show_one_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left
