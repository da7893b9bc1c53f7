"""Related systems on the GPU: bfloat16 and float32 there against float64 on the CPU."""

from __future__ import annotations

import pytest
import torch

from spattention import BandPattern
from spattention.baselines.state import State
from spattention.related import CCA, DGA, MEA, Elementwise, RecurrentNear, Related, RRAttention

HEADS, SPAN, WIDTH = 8, 1024, 64
CORES = 48  # core tokens of the last query, with a window of 256
CHOSEN: dict[str, Related] = {
    "mea": MEA(HEADS, SPAN),
    "mea_exclusive": MEA(HEADS, SPAN, BandPattern.exclusive(HEADS, SPAN)),
    "cca": CCA(HEADS, SPAN, group=16, window=256),
    "cca_exclusive": CCA(HEADS, SPAN, BandPattern.exclusive(HEADS, CORES), group=16, window=256),
    "dga_causal": DGA(HEADS, SPAN, block=160),
    "elementwise": Elementwise(HEADS, SPAN),
    "elementwise_exclusive": Elementwise(HEADS, SPAN, BandPattern.exclusive(HEADS, SPAN)),
}


@pytest.fixture(autouse=True)
def _forget_compilations() -> None:
    torch._dynamo.reset()  # their number is limited, per process


def drawn(length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(length)
    return [
        torch.randn(2, heads, length, WIDTH, generator=generator, device="cuda").to(dtype)
        for heads in (HEADS, 4, 4)
    ]


def check(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    # A few roundings of numbers up to the largest; core tokens are rounded once more.
    allowed = 8 * torch.finfo(dtype).eps * wanted.abs().max().item()
    allowed = max(allowed, 1e-4)
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=0.0, atol=allowed)


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("length", [1024, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gpu_gives_what_the_cpu_gives(name: str, length: int, dtype: torch.dtype) -> None:
    layer = CHOSEN[name].layer(0, 1)
    given = [t.requires_grad_() for t in drawn(length, dtype)]
    exact = [t.detach().cpu().double().requires_grad_() for t in given]
    found, wanted = (layer.attend(*each, WIDTH**-0.5) for each in (given, exact))
    check(found.detach(), wanted.detach(), dtype)
    gradients = torch.autograd.grad(found.square().sum(), given)
    for mine, other in zip(gradients, torch.autograd.grad(wanted.square().sum(), exact)):
        check(mine, other, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recurrent_heads_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    """By the kernel of flash-linear-attention where it is installed, gradients of decays too."""
    bands = BandPattern.exclusive(HEADS, SPAN)
    layer = RecurrentNear(HEADS, SPAN, bands, recurrent=4).layer(0, 1)
    given = [t.requires_grad_() for t in drawn(1000, dtype)]
    exact = [t.detach().cpu().double().requires_grad_() for t in given]
    found, wanted = (layer.attend(*each, WIDTH**-0.5) for each in (given, exact))
    # The kernel multiplies in TF32 or bfloat16, and the norm of a head passes its errors on.
    allowed = 2e-2 * wanted.abs().max().item()
    torch.testing.assert_close(found.detach().cpu().double(), wanted.detach(), rtol=0, atol=allowed)
    gradients = torch.autograd.grad(found.sum(), given)
    for mine, other in zip(gradients, torch.autograd.grad(wanted.sum(), exact)):
        error = (mine.cpu().double() - other).norm() / other.norm()
        assert error < 3e-2


STATED = ["cca", "cca_exclusive", "dga_causal", "elementwise", "elementwise_exclusive"]


@pytest.mark.parametrize("name", STATED)
def test_a_state_continues_on_the_gpu(name: str) -> None:
    layer, given = CHOSEN[name].layer(0, 1), drawn(700, torch.float32)
    wanted = layer.attend(*(t.cpu().double() for t in given), WIDTH**-0.5)
    state, found = State(), []
    with torch.no_grad():
        for part in zip(*(t.split([600, 1, 1, 98], dim=2) for t in given)):
            attend: object = layer.attend_after  # type: ignore[attr-defined]
            found.append(attend(state, *part, WIDTH**-0.5))  # type: ignore[operator]
            state.length += part[0].shape[2]
    check(torch.cat(found, dim=2), wanted, torch.float32)


@pytest.mark.parametrize("bands", [None, BandPattern.exclusive(HEADS, SPAN, widths="geometric")])
@pytest.mark.parametrize("length", [1024, 1000])
def test_compiled_blocks_are_the_dense_mask(bands: BandPattern | None, length: int) -> None:
    layer = RRAttention(HEADS, SPAN, bands, tau=0.5).layer(0, 1)
    given = drawn(length, torch.float32)
    kept = layer.select(given[0], given[1], WIDTH**-0.5)
    found = layer.attend(*given, WIDTH**-0.5)
    layer.select = lambda *_: kept.cpu()  # type: ignore[method-assign]  # rounding may change it
    wanted = layer.attend(*(t.cpu().double() for t in given), WIDTH**-0.5)
    check(found, wanted, torch.float32)
