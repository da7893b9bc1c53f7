"""`spattention tune` on a GPU: the kernels that this one runs."""

from __future__ import annotations

import pytest
import torch

from spattention.cli import main, tune
from spattention.impl.triton.hopper import planning


@pytest.mark.parametrize("kernels", ["default", "portable"])
def test_every_pass_is_timed(kernels: str, capsys: pytest.CaptureFixture[str]) -> None:
    hopper = (
        kernels == "default"
        and torch.cuda.get_device_capability()[0] == 9
        and planning.triton_is_tested()
    )
    command = ["tune", "--kernels", kernels, "--length", "256", "--heads", "2", "--head-dim", "64"]
    assert main([*command, "--blocks", "64", "128", "--warps", "4", "8", "--best", "9"]) == 0
    out = capsys.readouterr().out
    for name in tune.HOPPER if hopper else tune.PORTABLE:
        table = out.split(f"{'Hopper' if hopper else 'portable'} kernels, {name}")[1]
        rows = 128 if name == "forward_persistent" else 64
        launch = f"block_m={rows}, block_n=64, num_warps=4, num_stages=2, max_registers=None"
        assert f"LaunchConfig({launch})" in table
