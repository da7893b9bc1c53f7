"""DeepSpeed's ZeRO around a model with bands and sinks, on one CPU process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import spattention as spa

pytest.importorskip("deepspeed")
SCRIPT = Path(__file__).with_name("deepspeed_run.py")


def run(stage, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    extensions = {"TORCH_EXTENSIONS_DIR": str(folder.parent / "extensions")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(stage), str(folder)],
        env=os.environ | (world | address | extensions if stage else {}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_as_one_process(stage, tmp_path):
    """The same losses, and a folder that opens with the same bands, weights and sinks."""
    losses = run(stage, tmp_path / "zero")
    assert losses == pytest.approx(run(0, tmp_path / "plain"), abs=1e-5)
    spa.hf.register()
    found, expected = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        for name in ("zero", "plain")
    )
    assert found.config.spattention == expected.config.spattention
    weights = found.state_dict()
    assert any("sinks" in name for name in weights)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)
