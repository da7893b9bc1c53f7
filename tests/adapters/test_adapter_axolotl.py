"""The plugin for Axolotl: its base class, its manager and its hooks are Axolotl's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers

import spattention as spa

pytest.importorskip("axolotl.integrations.base")
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault

from spattention.adapters.axolotl import BandArgs

NAME = "spattention.adapters.axolotl.BandPlugin"


@pytest.fixture
def manager():
    PluginManager._instance = None
    found = PluginManager.get_instance()
    found.register(NAME)
    assert list(found.plugins) == [NAME]  # Axolotl logs what it cannot load, and continues
    yield found
    PluginManager._instance = None


def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def cfg(**fields):
    return DictDefault({"sequence_len": 64, "attn_implementation": "sdpa", **fields})


def test_a_model_gets_the_bands_of_the_file(manager):
    banded = model()
    fields = cfg(band_pattern="shared_local:widths=geometric,local=4", band_sinks=True)
    manager.pre_model_load(fields)
    manager.post_model_build(fields, banded)
    pattern = spa.BandPattern.shared_local(4, 64, widths="geometric", local=4)
    expected = spa.hf.apply(model(), pattern, sinks=True)
    ids = torch.randint(61, (1, 64))
    torch.testing.assert_close(banded(ids).logits, expected(ids).logits)
    assert "model.layers.0.self_attn.sinks" in banded.state_dict()


def test_the_span_of_the_file_comes_first(manager):
    banded = model()
    manager.post_model_build(cfg(band_pattern="exclusive", band_span=16), banded)
    assert banded.config.spattention["patterns"][0]["span"] == 16


def test_a_saved_band_model_opens(manager, tmp_path):
    """`register` runs before the model is opened, and nothing is converted again."""
    saved = spa.hf.apply(model(), spa.BandPattern.exclusive(4, 64))
    saved.save_pretrained(tmp_path)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    section = dict(opened.config.spattention)
    manager.post_model_build(cfg(), opened)
    assert opened.config.spattention == section


def test_a_dense_model_without_a_pattern_is_refused(manager):
    with pytest.raises(ValueError, match="`band_pattern` must be given"):
        manager.post_model_build(cfg(), model())


def test_packing_that_would_mix_documents_is_refused(manager):
    fields = cfg(sample_packing=True, attn_implementation=None)
    with pytest.raises(ValueError, match=r"must be sdpa or eager .* got None"):
        manager.pre_model_load(fields)


def test_the_fields_are_part_of_axolotls_schema(manager):
    from axolotl.integrations.config import merge_input_args

    _, schema = merge_input_args()
    assert issubclass(schema, BandArgs)
    assert {"band_pattern", "band_span", "band_sinks", "base_model"} <= set(schema.model_fields)


@pytest.mark.slow
def test_axolotl_trains_a_packed_adapter(tmp_path):
    """Its own `train`, and the adapter that it saved opens with its bands."""
    pytest.importorskip("bitsandbytes")  # as its model loader needs
    script = Path(__file__).with_name("axolotl_run.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["losses"]) == 6
    assert found["losses"][-1] < found["losses"][0] - 0.2
    pattern = spa.BandPattern.shared_local(8, 256, widths="geometric", local=8)
    assert spa.BandPattern.from_dict(found["section"]["patterns"][0]) == pattern
    spa.hf.register()
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert opened.config.spattention == found["section"]
