"""Blocks of queries that programs of the persistent forward pass draw from a counter: whichever
program computes a block, its bits are the same.
"""

from __future__ import annotations

import pytest
import torch

import spattention as spa
from spattention.impl.triton.hopper import TileOrder

from .cases import VARIANTS, Variant
from .plans import DRAWN, changed_plans, multiprocessors
from .test_gpu_kernels import check_cases, fill_new_memory_with_nan

__all__ = ["fill_new_memory_with_nan"]  # a fixture

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="needs Hopper"
)
CASES = 20
LENGTH, HEADS = 8000, 12
OPTIONS = {"impl": "triton", "return_lse": True}


def pattern_of(widths: str, prefix: int = 0) -> spa.BandPattern:
    """Heads of much and of little work: blocks of queries without keys among them."""
    bands = spa.BandPattern.shared_local(8, LENGTH, widths=widths).intervals
    far = spa.BandPattern.exclusive(8, LENGTH).intervals[4:]
    return spa.BandPattern((*bands, *far), LENGTH, prefix=prefix)


def inputs_of(seed: int, heads: int = HEADS, length: int = LENGTH) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (3, 1, heads, length, 128)
    return torch.randn(shape, device="cuda", generator=generator).bfloat16()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "variant", [each for each in VARIANTS if each.hopper and each.mode == "self"], ids=str
)
@pytest.mark.parametrize("programs", [1, 3])
def test_random_cases_of_drawn_blocks(variant: Variant, programs: int) -> None:
    with changed_plans(**DRAWN), multiprocessors(programs):
        check_cases(variant, CASES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prefix", [0, 4])
@pytest.mark.parametrize("widths", ["uniform", "geometric"])
def test_drawn_blocks_give_what_dealt_ones_give(widths: str, prefix: int) -> None:
    """The same bits on every run, beside a busy stream; the other kernel's within a rounding."""
    pattern, inputs = pattern_of(widths, prefix), inputs_of(0)
    with changed_plans(order=TileOrder.HEAD_MAJOR, persistent=False):
        out, lse = spa.band_attention(*inputs, pattern, **OPTIONS)
    with changed_plans(**{**DRAWN, "waves": 8}):
        dealt = spa.band_attention(*inputs, pattern, **OPTIONS)
    torch.testing.assert_close(dealt[0], out, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(dealt[1], lse, atol=1e-4, rtol=1e-4)
    busy, stream = torch.randn(4096, 4096, device="cuda").bfloat16(), torch.cuda.Stream()
    with changed_plans(**DRAWN):
        for _ in range(30):
            with torch.cuda.stream(stream):
                busy @ busy
            drawn = spa.band_attention(*inputs, pattern, **OPTIONS)
            assert torch.equal(drawn[0], dealt[0])
            assert torch.equal(drawn[1], dealt[1])


@pytest.mark.filterwarnings("ignore")
def test_drawn_blocks_of_two_streams_at_once() -> None:
    """Each call counts by itself."""
    pattern, each = pattern_of("geometric"), [inputs_of(seed) for seed in range(2)]
    streams = [torch.cuda.Stream() for _ in each]
    found: list[list[torch.Tensor]] = [[], []]
    with changed_plans(**DRAWN):
        expected = [spa.band_attention(*inputs, pattern, **OPTIONS)[0] for inputs in each]
        torch.cuda.synchronize()
        for _ in range(20):
            for inputs, stream, outs in zip(each, streams, found):
                with torch.cuda.stream(stream):
                    outs.append(spa.band_attention(*inputs, pattern, **OPTIONS)[0])
        torch.cuda.synchronize()
    for wanted, outs in zip(expected, found):
        assert all(torch.equal(out, wanted) for out in outs)


@pytest.mark.filterwarnings("ignore")
def test_drawn_blocks_in_a_graph() -> None:
    """Replays with other inputs, two calls a graph, and two graphs at once."""
    pattern = pattern_of("geometric")
    inputs = [inputs_of(0), inputs_of(1)]
    with changed_plans(**DRAWN):
        expected = [spa.band_attention(*each, pattern, **OPTIONS)[0] for each in inputs]
        held, graphs, outs = [], [], []
        for _ in range(2):
            given = inputs_of(2)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                pair = [spa.band_attention(*given, pattern, **OPTIONS)[0] for _ in range(2)]
            held.append(given)
            graphs.append(graph)
            outs.append(pair)
    streams = [torch.cuda.Stream() for _ in graphs]
    for turn in range(10):
        for place, given in enumerate(held):
            given.copy_(inputs[(turn + place) % 2])
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for place, pair in enumerate(outs):
            assert all(torch.equal(out, expected[(turn + place) % 2]) for out in pair)


@pytest.mark.filterwarnings("ignore")
def test_drawn_blocks_of_repeated_calls() -> None:
    """By the rules, and launched from a record, against calls that never are."""
    pattern = spa.BandPattern.shared_local(16, 16384)
    for seed in range(4):
        inputs = inputs_of(seed, 16, 16384)
        expected, _ = spa.band_attention(*inputs, pattern, **OPTIONS)
        for _ in range(3):
            assert torch.equal(spa.band_attention(*inputs, pattern, impl="triton"), expected)
