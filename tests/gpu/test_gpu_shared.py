"""On a GPU that another process keeps busy: whatever is interrupted must go on as if it was not.

Inputs change from one call to the next, so that memory that is read too early, or was never
written, holds what belongs to another one.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import spattention as spa
from spattention.impl.triton.hopper import (
    backward,
    backward_preprocess,
    forward,
    forward_persistent,
    fused_backward,
)

from .plans import changed_plans

REPEATS = 1000
INPUTS = 3
# Short and long kernels in bursts with pauses, as of a model that answers requests: interruptions
# come at all places of ours.
BURSTS = """
import random, time, torch
a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
parts = [a[:n, :n].contiguous() for n in (512, 2048, 4096, 8192)]
torch.cuda.synchronize()
print("ready", flush=True)
while True:
    for _ in range(random.randint(1, 40)):
        part = random.choice(parts)
        torch.softmax(part @ part, -1)
    torch.cuda.synchronize()
    time.sleep(random.choice((0, 0.001, 0.004)))
"""


@contextmanager
def another_process() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", BURSTS], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
        assert process.poll() is None, "the other process must be at work to the end"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("batch", "heads", "length", "head_dim"),
    [(16, 8, 2048, 64), (4, 8, 2048, 128), (1, 8, 4096, 64), (1, 8, 16384, 128)],
)
@pytest.mark.parametrize("widths", ["uniform", "geometric"])
def test_same_bits_beside_another_process(
    batch: int, heads: int, length: int, head_dim: int, widths: str
) -> None:
    check_same_bits(batch, heads, length, head_dim, widths)


@pytest.mark.parametrize(("length", "head_dim"), [(4096, 64), (4096, 128), (16384, 128)])
def test_same_bits_of_sums_in_turn(length: int, head_dim: int) -> None:
    """Blocks of keys that wait for one another while another process takes the GPU."""
    with changed_plans(fused_backward=True):
        check_same_bits(1, 8, length, head_dim, "geometric")


def check_same_bits(batch: int, heads: int, length: int, head_dim: int, widths: str) -> None:
    pattern = spa.BandPattern.shared_local(heads, length, widths=widths)
    torch.manual_seed(0)
    like = {"device": "cuda", "dtype": torch.bfloat16}
    shape, width = (batch, length, heads, head_dim), heads * head_dim
    leaves = [
        [torch.randn(shape, **like).requires_grad_() for _ in range(3)] for _ in range(INPUTS)
    ]
    rows = [torch.randn(batch * length, width, **like) for _ in range(INPUTS)]
    weight = torch.randn(width, width, **like) / width**0.5

    def step(which: int) -> list[torch.Tensor]:
        out = spa.band_attention(
            *(t.transpose(1, 2) for t in leaves[which]), pattern, impl="triton"
        )
        d_out = (rows[which] @ weight).view(shape).transpose(1, 2)  # a product just before, as ever
        return [out.detach(), *torch.autograd.grad(out, leaves[which], d_out)]

    expected = [step(which) for which in range(INPUTS)]
    differences = torch.zeros(4, dtype=torch.int64, device="cuda")
    order = random.Random(0)
    with another_process():
        for _ in range(REPEATS):
            which = order.randrange(INPUTS)
            pairs = zip(expected[which], step(which))
            differences += torch.stack([(wanted != found).any() for wanted, found in pairs])
        found = differences.tolist()
    assert found == [0, 0, 0, 0], "repeats with other bits of out, dQ, dK, dV"


def test_no_kernel_leaves_a_barrier_behind() -> None:
    """Memory of a barrier that was not ended must not hold anything else."""
    shapes = [(16, 2048, 64), (1, 4096, 64), (16, 2048, 128), (1, 16384, 128)]
    for batch, length, head_dim in shapes:
        pattern = spa.BandPattern.shared_local(8, length)
        inputs = torch.randn(
            3, batch, 8, length, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True
        )
        spa.band_attention(*inputs, pattern, impl="triton").sum().backward()
        if length == 4096 or head_dim == 128:
            with changed_plans(fused_backward=True):
                for deterministic in (True, False):
                    options = {"impl": "triton", "deterministic": deterministic}
                    spa.band_attention(*inputs, pattern, **options).sum().backward()
    kernels = (
        forward.forward_kernel,
        forward_persistent.forward_kernel,
        backward_preprocess.preprocess_kernel,
        backward.backward_kernel,
        fused_backward.fused_backward_kernel,
    )
    for kernel in kernels:
        compiled = kernel.device_caches[torch.cuda.current_device()][0].values()
        assert compiled
        for variant in compiled:
            ptx = variant.asm["ptx"]
            assert ptx.count("mbarrier.init") == ptx.count("mbarrier.inval") > 0, variant.name
