"""The measuring commands where there is no GPU to measure."""

from __future__ import annotations

import pytest
import torch

from spattention.cli import bench, main, tune


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", [["bench", "attention"], ["tune"]])
def test_without_a_gpu_it_says_so(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_a_case_that_is_no_shape_is_named() -> None:
    assert bench._shape("4x16x4096") == (4, 16, 4096)
    with pytest.raises(ValueError, match="got '4x16'"):
        bench._shape("4x16")


def test_defaults_are_the_cases_of_the_log() -> None:
    assert bench.Options().cases[-1] == "1x16x65536"
    assert tune.Options().head_dim == 128
