"""On a GPU that another process keeps busy: whatever is interrupted must go on as if it was not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import spattention as spa

REPEATS = 1000
# Kernels of many lengths, so that interruptions come at all places of ours.
BUSY = """
import torch
a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
parts = [a[:n, :n].contiguous() for n in (512, 2048, 4096, 8192)]
torch.cuda.synchronize()
print("busy", flush=True)
while True:
    for _ in range(20):
        for part in parts:
            part @ part
    torch.cuda.synchronize()
"""


@pytest.fixture
def other_process() -> Iterator[None]:
    """Another process that multiplies matrices on the same GPU."""
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "busy\n"
        yield
        assert process.poll() is None, "the other process must be at work to the end"
    finally:
        process.kill()
        process.wait()


@pytest.mark.usefixtures("other_process")
@pytest.mark.parametrize(
    ("batch", "heads", "length", "head_dim"),
    [(16, 8, 2048, 64), (4, 8, 2048, 128), (1, 8, 4096, 64), (1, 8, 16384, 128)],
)
@pytest.mark.parametrize("widths", ["uniform", "geometric"])
def test_same_bits_beside_another_process(
    batch: int, heads: int, length: int, head_dim: int, widths: str
) -> None:
    pattern = spa.BandPattern.shared_local(heads, length, widths=widths)
    torch.manual_seed(0)
    shape = (batch, heads, length, head_dim)
    leaves = [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)
    ]
    d_out = torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    def step() -> list[torch.Tensor]:
        out = spa.band_attention(*leaves, pattern, impl="triton")
        return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]

    first = step()
    differences = torch.zeros(4, dtype=torch.int64, device="cuda")
    for _ in range(REPEATS):
        differences += torch.stack([(a != b).any() for a, b in zip(first, step())])
    assert differences.tolist() == [0, 0, 0, 0], "repeats with other bits of out, dQ, dK, dV"
