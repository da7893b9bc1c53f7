"""A recipe whose attention changes after its first steps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from spattention import BandPattern, hf
from spattention.data.prepare import prepare
from spattention.hf.config import read_section
from spattention.training import callbacks
from spattention.training.pretrain import pretrain
from spattention.training.recipe import recipe_from

sys.path.insert(0, str(Path(__file__).parent))
from small_run import losses, recipe

SWITCH = {"attention": "dense", "first_attention": "exclusive", "first_steps": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare(folder, None, vocabulary=320, held_out=0.05)
    return folder


@pytest.fixture(scope="module")
def switched(data, tmp_path_factory):
    """A run of eight steps, three of them with bands."""
    folder = tmp_path_factory.mktemp("switched") / "run"
    assert pretrain(recipe(data, **SWITCH), folder).finished
    return folder


def test_attention_changes_after_the_first_steps(data, switched, tmp_path):
    """The first steps have the losses of bands, those after them do not."""
    bands = tmp_path / "bands"
    assert pretrain(recipe(data, attention="exclusive"), bands).finished
    mine, theirs = losses(switched), losses(bands)
    assert mine[:3] == theirs[:3]
    assert all(one != other for one, other in zip(mine[3:8], theirs[3:8]))


def test_a_switched_model_is_saved_as_it_ended(switched):
    """The saved model attends all distances."""
    hf.register()
    model = AutoModelForCausalLM.from_pretrained(switched / "checkpoint-8")
    section = read_section(model.config)
    heads = model.config.num_attention_heads
    assert set(section.layer_patterns) == {BandPattern.dense(heads, 32)}


@pytest.mark.parametrize("stop", [2, 4], ids=["before the switch", "after it"])
def test_a_switched_run_continues(data, switched, tmp_path, monkeypatch, stop):
    """Stopped before its switch or after it, a run has the losses of one go."""

    def ends(self, args, state, control, **_):
        if state.global_step == stop:
            control.should_save = control.should_training_stop = True

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.TimeLimitCallback, "on_step_end", ends)
        assert pretrain(recipe(data, **SWITCH), folder, minutes=1).step == stop
    assert pretrain(recipe(data, **SWITCH), folder).finished
    assert losses(folder)[:8] == losses(switched)[:8]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"first_steps": None}, "`first_attention` and `first_steps` must be given together"),
        ({"first_attention": None}, "`first_attention` and `first_steps` must be given together"),
        ({"first_steps": 8}, "`first_steps` must be less than `steps` = 8, got 8"),
        ({"parallel": "fsdp2"}, '`first_attention` must be left out under `parallel` = "fsdp2"'),
    ],
)
def test_switches_that_cannot_be_are_refused(tmp_path, changes, error):
    with pytest.raises(ValueError, match=error):
        recipe(tmp_path, **SWITCH | changes)


def test_a_switch_takes_patterns_alone(data, tmp_path):
    """Another attention than bands cannot be switched to or from."""
    with pytest.raises(ValueError, match="longformer is another attention"):
        pretrain(recipe(data, **SWITCH | {"first_attention": "longformer"}), tmp_path / "run")


def test_recipes_without_a_switch_read_as_before(data):
    """A recipe that was written before the fields existed has no switch."""
    values = recipe(data).to_dict()
    before = {k: v for k, v in values.items() if not k.startswith("first_")}
    assert recipe_from({k: v for k, v in before.items() if v is not None}).differences(before) == []
