"""Weights that reach a model with other bands or sinks, by ways that pass by its own loading."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import spattention as spa

transformers = pytest.importorskip("transformers")
P = spa.BandPattern
BANDS, OTHERS = P.exclusive(4, 64), P.shared_local(4, 32)


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=128,
    )
    return transformers.LlamaForCausalLM(config).eval()


def banded(pattern: P = BANDS, seed: int = 0, **options: Any) -> Any:
    return spa.hf.apply(model(seed), pattern, **options)


def of_layer(weights: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{layer}."
    names = (name for name in weights if name.startswith(prefix))
    return {name.removeprefix(prefix): weights[name] for name in names}


def test_a_layer_refuses_weights_of_other_bands(tmp_path: Path) -> None:
    """Layer by layer, strictly, from a file that holds tensors alone."""
    safetensors = pytest.importorskip("safetensors.torch")
    banded().save_pretrained(tmp_path)
    weights = safetensors.load_file(tmp_path / "model.safetensors")
    banded(seed=1).model.layers[0].load_state_dict(of_layer(weights, 0))
    with pytest.raises(ValueError, match="spattention_mark"):
        banded(OTHERS, 1).model.layers[0].load_state_dict(of_layer(weights, 0))


def test_a_distributed_checkpoint_of_other_bands(tmp_path: Path) -> None:
    """It is read in place: before any weight is."""
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    saved = banded()
    dcp.save(saved.state_dict(), checkpoint_id=tmp_path)
    into = banded(OTHERS, 1)
    before = into.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(dcp.CheckpointException, match="must be that of a model with the attention"):
        dcp.load(into.state_dict(), checkpoint_id=tmp_path)
    assert into.model.layers[0].mlp.up_proj.weight.equal(before)
    same = banded(seed=1)
    dcp.load(same.state_dict(), checkpoint_id=tmp_path)
    assert same.lm_head.weight.equal(saved.lm_head.weight)


def test_a_distributed_checkpoint_with_sinks(tmp_path: Path) -> None:
    """A model without sinks would not ask for them."""
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    dcp.save(banded(sinks=-3.0).state_dict(), checkpoint_id=tmp_path)
    with pytest.raises(dcp.CheckpointException, match="`sinks=True`"):
        dcp.load(banded(seed=1).state_dict(), checkpoint_id=tmp_path)
    into = banded(seed=1, sinks=True)
    dcp.load(into.state_dict(), checkpoint_id=tmp_path)
    assert into.model.layers[0].self_attn.sinks.eq(-3.0).all()


@pytest.mark.parametrize("device_map", [None, {"": "cpu"}])
def test_accelerate_and_sinks(tmp_path: Path, device_map: Any) -> None:
    """A checkpoint with sinks for a model without, and the other way round."""
    accelerate = pytest.importorskip("accelerate")
    banded(sinks=-3.0).save_pretrained(tmp_path / "with")
    banded().save_pretrained(tmp_path / "without")
    for folder, into in (("with", banded(seed=1)), ("without", banded(seed=1, sinks=True))):
        with pytest.raises(ValueError, match="sinks"):
            accelerate.load_checkpoint_in_model(into, tmp_path / folder, device_map=device_map)
    into = banded(seed=1, sinks=True)
    accelerate.load_checkpoint_in_model(into, tmp_path / "with", device_map=device_map)
    assert into.model.layers[0].self_attn.sinks.eq(-3.0).all()


def test_an_adapter_with_sinks_needs_a_place() -> None:
    """PEFT passes over weights for which a model has none."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM")
    weights = peft.get_peft_model_state_dict(peft.get_peft_model(banded(sinks=True), config))
    assert any(".sinks." in name for name in weights)
    into = peft.get_peft_model(banded(seed=1), config)
    with pytest.raises(ValueError, match="sinks that the adapter's weights hold"):
        peft.set_peft_model_state_dict(into, weights)


def test_taken_off_sinks_are_not_asked_for() -> None:
    """The state dict of a model that is dense again has no sinks."""
    taken_off = banded(sinks=True)
    taken_off.set_attn_implementation("sdpa")
    del taken_off.config.spattention
    weights = taken_off.state_dict()
    assert not any("sinks" in name for name in weights)
    taken_off.load_state_dict(weights)


EARLY = """
    from accelerate import load_checkpoint_in_model
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from test_hf_partial_loading import OTHERS, banded, model
    banded().save_pretrained({folder!r})
    for into in (model(), banded(OTHERS, 1)):
        try:
            load_checkpoint_in_model(into, {folder!r}, device_map={{"": "cpu"}})
        except ValueError as error:
            assert "spattention_mark" in str(error), error
        else:
            raise AssertionError("loaded")
    adapted = get_peft_model(banded(), LoraConfig(task_type="CAUSAL_LM"))
    assert any("spattention_mark" in name for name in get_peft_model_state_dict(adapted))
"""


def test_functions_imported_before_register_check_too(tmp_path: Path) -> None:
    """In a new process, whose first lines import them by name."""
    pytest.importorskip("accelerate")
    pytest.importorskip("peft")
    script = tmp_path / "early.py"
    script.write_text(textwrap.dedent(EARLY).format(folder=str(tmp_path / "saved")))
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {here!r}); import runpy; "
               f"runpy.run_path({str(script)!r})"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
