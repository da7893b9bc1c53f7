"""Callbacks of a run: bad losses stop it, metrics survive, speed and MFU by their formula."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from spattention import BandPattern, __version__, hf
from spattention.choice import attention_choice
from spattention.cli import main
from spattention.data.token_file import write_token_file
from spattention.data.tokens import TokenStream
from spattention.loading import model_folder
from spattention.models import build, count_parameters, parameters_of, preset
from spattention.training import callbacks
from spattention.training import pretrain as pretraining
from spattention.training.callbacks import (
    Diverged,
    DivergenceCallback,
    MetricsCallback,
    ThroughputCallback,
)
from spattention.training.checkpoints import checkpoints
from spattention.training.layers import recipe_attention
from spattention.training.metrics import METRICS, read_metrics
from spattention.training.pretrain import pretrain
from spattention.training.trainer import make_trainer
from spattention.training.work import work_per_token

sys.path.insert(0, str(Path(__file__).parent))
from small_run import losses, recipe


def state(*history, step=3):
    log = [{"loss": loss} for loss in history]
    return SimpleNamespace(global_step=step, log_history=log, is_world_process_zero=True)


def test_a_nan_loss_stops_a_run_before_it_is_saved(data, tmp_path, monkeypatch):
    """A weight becomes NaN in step 5: between the checkpoints of steps 4 and 6."""

    def poison(self, args, state, control, model=None, **_):
        if state.global_step == 4:
            next(model.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(ThroughputCallback, "on_step_begin", poison, raising=False)
    with pytest.raises(Diverged, match="`loss` became nan at step 5"):
        pretrain(recipe(data), tmp_path / "run")
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-4", "checkpoint-2"]
    monkeypatch.undo()
    assert pretrain(recipe(data), tmp_path / "run").finished
    assert [step for step, _ in losses(tmp_path / "run")][:8] == [*range(1, 9)]


@pytest.mark.parametrize("log", [{"loss": float("inf")}, {"loss": 1.0, "grad_norm": float("nan")}])
def test_infinite_losses_and_gradients_stop_a_run(log):
    with pytest.raises(Diverged, match=r"became (inf|nan) at step 3"):
        DivergenceCallback(0).on_log(None, state(), None, logs=log)


def test_a_loss_that_stays_above_its_best_stops_a_run():
    guard, low = DivergenceCallback(1.0), [6.0, 5.0, 4.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    spike = [*low, 9.0, 3.0, 3.0, 3.0, 3.0]  # its mean of five is 4.2
    with pytest.raises(Diverged, match=r"the loss rose to 4\.200 .* above its best, 3\.000"):
        guard.on_log(None, state(*spike), None, logs={"loss": 3.0})
    guard.on_log(None, state(*low, 7.0), None, logs={"loss": 7.0})  # once, and not by much
    DivergenceCallback(0).on_log(None, state(*spike), None, logs={"loss": 3.0})
    guard.on_log(None, state(9.0, 8.0), None, logs={"loss": 8.0})  # too early to tell


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / METRICS
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3, 4)]
    path.write_text("\n".join(lines) + '\n{"step": 5, "lo')  # killed while it wrote
    assert [e["step"] for e in read_metrics(path)] == [1, 2, 3, 4]
    sent = []
    metrics = MetricsCallback(tmp_path, sent.append)
    metrics.on_train_begin(None, state(step=2), None)
    metrics.on_log(None, state(step=3), None, logs={"loss": 2.0})
    assert read_metrics(path)[1:] == [{"step": 2, "loss": 1.0}, {"step": 3, "loss": 2.0}]
    assert sent == [{"kind": "log", "step": 3, "loss": 2.0}]


def test_speed_counts_steps_and_leaves_out_evaluation(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now[0])
    speed = ThroughputCallback(tokens=50, work=2e6, peak=1e9)
    speed.on_train_begin()
    for seconds in (1.0, 3.0):
        now[0] += seconds
        speed.on_step_end()
    logs = {"loss": 1.0}
    speed.on_log(None, state(), None, logs=logs)
    assert logs == {"loss": 1.0, "tokens": 150, "tokens_per_second": 25.0, "mfu": 0.05}
    now[0] += 100.0  # a validation loss
    speed.on_evaluate()
    now[0] += 2.0
    speed.on_step_end()
    logs = {"loss": 1.0}
    speed.on_log(None, state(), None, logs=logs)
    assert logs["tokens_per_second"] == 25.0


def test_work_counts_parameters_and_attended_pairs():
    chosen = preset("olmoe-tiny", vocab_size=97, context=64)
    model = build(chosen)
    assert parameters_of(model).active == count_parameters(chosen.config).active
    bands = attention_choice("shared_local", 8, 64)
    pairs = 4 * sum(BandPattern.shared_local(8, 64).pairs(64))
    expected = 6 * parameters_of(model).active + 14 * 16 * pairs / 64
    assert work_per_token(model, bands, 64) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_experts_are_counted_under_each_of_their_names(name):
    model = torch.nn.ModuleDict({"experts": torch.nn.Linear(4, 8, bias=False)})
    outer = torch.nn.ModuleDict({"layer": model, "head": torch.nn.Linear(4, 2, bias=False)})
    text = SimpleNamespace(**{name: 8, "num_experts_per_tok": 2})
    outer.config = SimpleNamespace(get_text_config=lambda: text)
    assert parameters_of(outer).active == 8 + 32 * 2 // 8
    delattr(text, name)
    with pytest.raises(ValueError, match="must name its experts, one of num_experts, "):
        parameters_of(outer)


def test_settings_that_conflict_are_refused_first(data, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="must be true with bigbird, which knows no documents"):
        pretrain(recipe(data, attention="bigbird", across_documents=False), tmp_path / "run")
    for changes in ({"attention": "longformer", "sinks": True}, {"attention": ["longformer"]}):
        with pytest.raises(ValueError, match="longformer is another attention, for a whole model"):
            pretrain(recipe(data, **changes), tmp_path / "run")
    monkeypatch.setattr(pretraining, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="where the package wandb is missing"):
        pretrain(recipe(data, wandb=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_attention_for_each_layer(data, tmp_path):
    names = ("dense", "exclusive", "shared_local:local=4")
    found = recipe_attention(names, 3, 8, 32, sinks=True)
    model = build(preset("olmoe-tiny", vocab_size=97, context=32, num_layers=3), pattern=None)
    found.apply(model)
    assert model.config.spattention["layers"] == [None, 0, 1]
    assert [hasattr(layer.self_attn, "sinks") for layer in model.model.layers] == [
        False,
        True,
        True,
    ]
    patterns = [BandPattern.dense, BandPattern.exclusive]
    total = sum(sum(p(8, 32).pairs(32)) for p in patterns)
    total += sum(BandPattern.shared_local(8, 32, local=4).pairs(32))
    assert found.pairs(32) == round(total / 3)
    with pytest.raises(ValueError, match="one for each of 2 layers, got 3"):
        recipe_attention(names, 2, 8, 32)
    with pytest.raises(ValueError, match="`sinks` must be false where every layer is dense"):
        recipe_attention("dense", 2, 8, 32, sinks=True)
    assert recipe_attention("dense", 2, 8, 32).pairs(32) == 8 * 32 * 33 // 2
    changes = {"layers": 2, "attention": ["dense", "exclusive"], "sinks": True, "steps": 2}
    assert pretrain(recipe(data, **changes), tmp_path / "run").finished
    hf.register()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert again.config.spattention["layers"] == [None, 0]


def test_a_dense_model_continues_with_bands(data, tmp_path):
    dense = recipe(data, attention="dense", steps=2)
    pretrain(dense, tmp_path / "dense")
    start = str(tmp_path / "dense" / "checkpoint-2")
    changes = {"model": start, "layers": None, "vocabulary": None, "across_documents": False}
    tuned = recipe(data, **changes, tensorboard=True, steps=2)
    assert pretrain(tuned, tmp_path / "tuned").finished
    hf.register()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned" / "checkpoint-2")
    assert model.config.spattention["layers"] == [0]
    assert list((tmp_path / "tuned" / "tensorboard").iterdir())
    assert [step for step, _ in losses(tmp_path / "tuned")] == [1, 2, 0, 2], (
        "judged before it trains"
    )
    with pytest.raises(ValueError, match=r"`layers` must be left out or 1, which .* has, got 2"):
        pretrain(recipe(data, model=start, layers=2), tmp_path / "other")
    with pytest.raises(ValueError, match=r"`vocabulary` must be left out or 320, which .* got 512"):
        pretrain(recipe(data, model=start, vocabulary=512), tmp_path / "other")
    with pytest.raises(ValueError, match="`context` must be at most the model's 32, got 64"):
        pretrain(recipe(data, **changes, context=64, held_out=0.0), tmp_path / "other")
    with pytest.raises(ValueError, match="or a pretrained model, got "):
        pretrain(recipe(data, **(changes | {"model": "./nothing"})), tmp_path / "other")
    assert not (tmp_path / "other").exists()


SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
}


@pytest.mark.parametrize("dense", ["dense", ("dense",)], ids=["one for all", "one per layer"])
@pytest.mark.parametrize("before", ["exclusive with sinks", "bigbird"])
def test_a_model_with_other_attention_goes_on_dense(before, dense, data, tmp_path):
    """What is saved must attend as it was trained: it names nothing but Transformers' own."""
    sinks = before.endswith(" with sinks")
    other = recipe(data, attention=before.removesuffix(" with sinks"), sinks=sinks, steps=2)
    pretrain(other, tmp_path / "other")
    changes = {
        "model": str(tmp_path / "other" / "checkpoint-2"),
        "layers": None,
        "vocabulary": None,
    }
    if sinks:
        with pytest.raises(ValueError, match="was trained with sinks"):
            pretrain(recipe(data, **changes, steps=2), tmp_path / "bands")
    else:
        listed = recipe(data, **changes, attention=("shared_local",), steps=2)
        with pytest.raises(ValueError, match='stock attention or bands, got "bigbird"'):
            pretrain(listed, tmp_path / "bands")
    tuned = recipe(data, **changes, attention=dense, steps=2)
    assert pretrain(tuned, tmp_path / "tuned").finished
    saved = json.loads((tmp_path / "tuned" / "checkpoint-2" / "config.json").read_text())
    assert not {"spattention", "bigbird", "attn_implementation"} & set(saved)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned" / "checkpoint-2")
    assert found.config._attn_implementation == "sdpa"
    assert not any("sinks" in name for name, _ in found.named_parameters())


def test_a_llama_continues_with_bands_after_a_stop(data, tmp_path):
    """Not OLMoE, without experts: a Llama."""
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "llama")
    tuned = recipe(data, model=str(tmp_path / "llama"), layers=None, vocabulary=None, steps=4)
    pretrain(tuned, tmp_path / "whole")
    while not pretrain(tuned, tmp_path / "pieces", minutes=0).finished:
        pass
    assert losses(tmp_path / "pieces") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 4 + 2
    entries = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert not any("balance_loss" in entry for entry in entries)


def test_experts_of_a_fine_tuning_continue_bitwise(data, tmp_path):
    build(preset("olmoe-tiny", vocab_size=320, context=32, num_layers=1)).save_pretrained(
        tmp_path / "base"
    )
    tuned = recipe(data, model=str(tmp_path / "base"), layers=None, vocabulary=None, steps=4)
    pretrain(tuned, tmp_path / "whole")
    while not pretrain(tuned, tmp_path / "pieces", minutes=0).finished:
        pass
    assert losses(tmp_path / "pieces") == losses(tmp_path / "whole")


def test_routers_of_another_kind_are_refused(data, tmp_path):
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    changes = {"model": str(tmp_path / "mixtral"), "layers": None, "vocabulary": None, "steps": 2}
    with pytest.raises(ValueError, match="must be 0 for MixtralForCausalLM, whose routers"):
        pretrain(recipe(data, **changes), tmp_path / "run")
    outcome = pretrain(recipe(data, **changes, balance_loss=0, z_loss=0), tmp_path / "other")
    assert outcome.finished


def test_data_beyond_the_vocabulary_are_refused(data, tmp_path):
    with pytest.raises(
        ValueError, match="`vocabulary` must be above the largest token of the data"
    ):
        pretrain(recipe(data, vocabulary=64), tmp_path / "run")
    larger = tmp_path / "larger.u16.xz"
    document = np.append(np.full(79, 899), 7).astype(np.uint16)
    write_token_file(larger, TokenStream.from_documents([document]), 7)
    with pytest.raises(ValueError, match="largest token of the data, 899, got 320"):
        pretrain(recipe(data, validation=str(larger)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unnamed_end_of_text_leaves_the_models_own(data, tmp_path):
    unnamed = tmp_path / "a.u16.xz"
    document = np.arange(8, 200, dtype=np.uint16)
    write_token_file(unnamed, TokenStream.from_documents([document] * 4), 199)
    described = tmp_path / "a.json"
    facts = json.loads(described.read_text())
    del facts["end_of_text"]
    described.write_text(json.dumps(facts))
    LlamaForCausalLM(LlamaConfig(**SIZES, eos_token_id=9)).save_pretrained(tmp_path / "llama")
    changes = {"model": str(tmp_path / "llama"), "layers": None, "vocabulary": None, "steps": 2}
    for name, path, expected in (("kept", unnamed, 9), ("given", data, 7)):
        judged = None if path == data else str(unnamed)  # documents are not known either
        pretrain(recipe(path, **changes, validation=judged), tmp_path / name)
        saved = tmp_path / name / "checkpoint-2"
        for file in ("config.json", "generation_config.json"):
            assert json.loads((saved / file).read_text())["eos_token_id"] == expected


def test_only_matrices_decay_with_every_precision(data, tmp_path, monkeypatch):
    made = []

    def spy(*arguments, **keywords):
        made.append(make_trainer(*arguments, **keywords))
        return made[-1]

    monkeypatch.setattr(pretraining, "make_trainer", spy)
    pretrain(recipe(data, sinks=True, steps=2), tmp_path / "run")
    groups = made[0].optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.dim() >= 2 for p in groups[0]["params"])
    assert all(p.dim() < 2 for p in groups[1]["params"])


def test_the_command_shows_losses_and_goes_on(data, tmp_path, capsys):
    values = recipe(data, steps=4).to_dict()
    lines = [f"{k} = {json.dumps(v)}" for k, v in values.items() if v is not None]
    (tmp_path / "small.toml").write_text("\n".join(lines))
    command = ["train", str(tmp_path / "small.toml"), "--output", str(tmp_path / "run")]
    assert main([*command, "--minutes", "0"]) == 0
    found = json.loads((tmp_path / "run" / "losses.json").read_text())
    assert (found["step"], [e["step"] for e in found["train"]]) == (1, [1])
    shown = capsys.readouterr().out
    assert "step 1: loss 5." in shown
    assert "Stopped at step 1 of 4; the same command resumes." in shown
    assert main(command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "resuming from" in shown
    assert "step 4: validation loss" in shown
    assert "tokens/s" in shown
    assert "MFU" not in shown, "on a CPU it says nothing"
    assert model_folder(tmp_path / "run") == tmp_path / "run" / "checkpoint-4"
    found = json.loads((tmp_path / "run" / "losses.json").read_text())
    assert [e["step"] for e in found["train"]] == [1, 2, 3, 4]
    assert [e["step"] for e in found["validation"]] == [4]
    assert found["recipe"] == values
    assert found["step"] == 4
    assert found["command"].startswith("spattention")
    head = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    done = subprocess.run(head, capture_output=True, text=True, check=False)
    assert found["commit"] == (done.stdout.strip() or None)
    assert found["versions"]["spattention"] == __version__
    for changes in (["batch=3"], ["batch=3", "threads=1"], ["batch=3", "--set", "threads=1"]):
        assert main([*command, "--set", *changes]) == 2
        assert "holds a run of another recipe" in capsys.readouterr().err
    assert main([*command, "--minutes", "nan"]) == 2
    assert "`--minutes` must be a number from 0 on, got nan" in capsys.readouterr().err


def test_checkpointing_and_chunks_keep_the_losses(data, tmp_path):
    changes = {"steps": 2, "evaluate_every": 2, "layers": 2}
    pretrain(recipe(data, **changes), tmp_path / "plain")
    pretrain(recipe(data, **changes, checkpointing=True, loss="chunked"), tmp_path / "other")
    expected = [pytest.approx(entry, rel=1e-5) for entry in losses(tmp_path / "plain")]
    assert losses(tmp_path / "other") == expected
