"""Masks against a double loop over queries and keys that says in words what each head sees."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from small_models import CHOSEN, HEADS, LAYERS, MASKED, SPAN, inputs
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import flex_attention

from spattention.baselines import BigBird, Longformer, PublishedMask, masks

CPU = torch.device("cpu")
close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def _forget_compilations():
    torch._dynamo.reset()  # their number is limited, per process


def longformer(layer: int) -> Callable[[int, int, int], bool]:
    # 3 layers: windows 3, 5, 7; the upper two see every 2nd and every 3rd token in heads 2 and 3.
    window, step = ((3, 1), (5, 2), (7, 3))[layer]

    def sees(head: int, i: int, j: int) -> bool:
        mine = step if head >= 2 else 1
        return j < 2 or i - j in [mine * k for k in range(window)]

    return sees


def bigbird(layer: int) -> Callable[[int, int, int], bool]:
    blocks = CHOSEN["bigbird"].blocks(layer)

    def sees(head: int, i: int, j: int) -> bool:
        return bool(blocks[head, i // 4, j // 4])

    return sees


def published_longformer(layer: int) -> Callable[[int, int, int], bool]:
    return lambda head, i, j: i - j <= 12 or j < 1  # N = 48


def published_bigbird(layer: int) -> Callable[[int, int, int], bool]:
    return lambda head, i, j: i - j <= 6 or (i - j) % 16 == 0


def published_reformer(layer: int) -> Callable[[int, int, int], bool]:
    def bucket(head: int, p: int) -> int:
        return (3 * p + 13 * head + 7) % 8  # 48 // 6 buckets

    def sees(head: int, i: int, j: int) -> bool:
        mine, other = bucket(head, i), bucket(head, j)
        return other in (mine, (mine + 1) % 8, (mine - 1) % 8) or i - j <= 8

    return sees


RULES = {
    "longformer": longformer,
    "bigbird": bigbird,
    "published_longformer": published_longformer,
    "published_bigbird": published_bigbird,
    "published_reformer": published_reformer,
}


def looped(name: str, layer: int, length: int) -> torch.Tensor:
    """Mask `[H, N, N]`, pair by pair."""
    sees = RULES[name](layer)
    mask = torch.zeros(HEADS, length, length, dtype=torch.bool)
    for head in range(HEADS):
        for i in range(length):
            for j in range(i + 1):
                mask[head, i, j] = sees(head, i, j)
    return mask


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("name", MASKED)
def test_masks_are_those_of_a_double_loop(name, layer):
    found = CHOSEN[name].layer(layer, LAYERS)
    assert torch.equal(found.dense(SPAN, SPAN, CPU), looped(name, layer, SPAN))
    assert torch.equal(found.dense(5, 33, CPU), looped(name, layer, 33)[:, 28:])  # with a cache


@pytest.mark.parametrize("name", MASKED)
def test_outputs_are_those_of_a_softmax_over_the_pairs(name):
    layer = CHOSEN[name].layer(2, LAYERS)
    query, key, value = inputs(37)
    mask = looped(name, 2, 37)
    wanted = torch.zeros_like(query)
    for head in range(HEADS):
        for i in range(37):
            seen = mask[head, i].nonzero()[:, 0]
            scores = 0.3 * (key[:, head // 2, seen] @ query[:, head, i, :, None])[..., 0]
            weights = scores.softmax(dim=-1)
            wanted[:, head, i] = (weights[..., None] * value[:, head // 2, seen]).sum(dim=1)
    close(layer.attend(query, key, value, 0.3), wanted, rtol=0.0, atol=1e-12)
    last = layer.attend(query[:, :, 30:], key, value, 0.3)
    close(last, wanted[:, :, 30:], rtol=0.0, atol=1e-12)
    weights = layer.weights(query, key, 0.3, 10, 20)
    found = weights.double() @ value.repeat_interleave(2, dim=1)
    close(found, wanted[:, :, 10:20], rtol=0.0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("length", [300, 512])
def test_block_masks_give_what_dense_masks_do(name, length):
    """FlexAttention without compilation, on the CPU; the compiled one is tested on the GPU."""
    kinds = {"longformer": Longformer, "bigbird": BigBird}
    if name in kinds:
        baseline = kinds[name](HEADS, 512)
    else:
        baseline = PublishedMask(HEADS, 512, mask=name.removeprefix("published_"))
    layer = baseline.layer(2, LAYERS)
    query, key, value = inputs(length)
    wanted = layer.attend(query, key, value, 0.3)
    found = layer.attend_blocks(query, key, value, 0.3)
    close(found, wanted, rtol=0.0, atol=1e-12)
    blocks = layer.block_mask(length, CPU)
    # What FlexAttention skips, and what it takes without looking, are as in the dense mask.
    dense = layer.dense(length, length, CPU)
    for head in range(HEADS):
        for row in range(math.ceil(length / 128)):
            whole = blocks.full_kv_indices[0, head, row, : blocks.full_kv_num_blocks[0, head, row]]
            some = blocks.kv_indices[0, head, row, : blocks.kv_num_blocks[0, head, row]]
            strip = dense[head, row * 128 : (row + 1) * 128]
            counts = [int(part.sum()) for part in strip.split(128, dim=1)]
            sizes = [part.numel() for part in strip.split(128, dim=1)]
            assert all(counts[k] == sizes[k] for k in whole.tolist())
            assert {k for k, n in enumerate(counts) if n} == {*whole.tolist(), *some.tolist()}


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("length", [1, 7, 33, SPAN])
def test_pairs_are_those_of_the_masks(name, length):
    counts = [int(looped(name, layer, length).sum()) for layer in range(LAYERS)]
    assert CHOSEN[name].pairs(length, LAYERS) == round(sum(counts) / LAYERS)


def test_big_bird_draws_blocks():
    """BigBird draws blocks between window and global ones."""
    baseline = BigBird(HEADS, 64, block=2, window=3, global_blocks=2, random=3, seed=7)
    tables = [baseline.blocks(layer) for layer in range(2)]
    for table in tables:
        assert not table.triu(1).any()
        for head in range(HEADS):
            for row in range(32):
                seen = set(table[head, row].nonzero()[:, 0].tolist())
                fixed = {k for k in (0, 1, row - 2, row - 1, row) if 0 <= k <= row}
                assert fixed <= seen
                between = set(range(2, row - 2))
                assert seen - fixed <= between
                assert len(seen - fixed) == min(3, len(between))
    assert not torch.equal(tables[0], tables[1])  # layers draw differently
    assert not torch.equal(tables[0][0], tables[0][1])  # and heads
    assert torch.equal(tables[0], BigBird(HEADS, 64, 2, 3, 2, 3, 7).blocks(0))
    assert not torch.equal(tables[0], BigBird(HEADS, 64, 2, 3, 2, 3, 8).blocks(0))


def test_longformer_has_the_papers_windows_and_gaps():
    """12 layers, 8 heads, 1,024 tokens: 32 to 512, gaps of 1, 2, 3 from layer 6 on in 2 heads."""
    baseline = Longformer(8, 1024)
    assert [baseline.window(k, 12) for k in (0, 11)] == [32, 512]
    steps = [baseline.steps(k, 12) for k in range(12)]
    assert all(row[:6] == [1] * 6 for row in steps)
    assert [row[6:] for row in steps] == [[k, k] for k in (1, 1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 4)]


@pytest.mark.parametrize("length", [1024, 8192])
def test_published_masks_at_published_lengths(length):
    """Published masks at the lengths that they were run at."""
    seen = [
        PublishedMask(8, length, mask=mask).layer(0, 1).dense(1, length, CPU)[:, 0].nonzero()
        for mask in ("longformer", "bigbird", "reformer")
    ]
    last = length - 1
    wanted = {*range(16), *range(last - 256, length)}
    assert {j for h, j in seen[0].tolist() if h == 3} == wanted
    step = max(16, length // 32)
    wanted = {*range(8), *range(last - 128, length), *range(last % step, length, step)}
    assert {j for h, j in seen[1].tolist() if h == 3} == wanted
    count = length // 64

    def bucket(p: int) -> int:
        return (3 * p + 13 * 3 + 7) % count

    near = {(bucket(last) + k) % count for k in (-1, 0, 1)}
    wanted = {j for j in range(length) if bucket(j) in near or last - j <= 8}
    assert {j for h, j in seen[2].tolist() if h == 3} == wanted


@pytest.mark.parametrize("name", MASKED)
def test_layers_share_one_compiled_graph(name):
    """Compilations are limited, and beyond the limit FlexAttention would make N x N matrices."""
    counter = CompileCounter()
    flex = torch.compile(flex_attention, dynamic=False, fullgraph=True, backend=counter)
    query = torch.randn(1, HEADS, SPAN, 16)
    for index in range(LAYERS):
        CHOSEN[name].layer(index, LAYERS).attend_blocks(query, query, query, 0.25, flex=flex)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", MASKED)
def test_compiled_layers_share_one_graph(name):
    """A number of a layer alone in the code would compile each layer anew."""
    counter = CompileCounter()
    attend = torch.compile(
        lambda layer, tensor: layer.attend(tensor, tensor, tensor, 0.25),
        dynamic=False,
        backend=counter,
    )
    query = torch.randn(1, HEADS, SPAN, 16)
    for index in range(LAYERS):
        attend(CHOSEN[name].layer(index, LAYERS), query)
    assert counter.frame_count == 1


def test_more_shapes_than_the_compilation_limit(monkeypatch):
    """Recall asks for many lengths in one process."""
    eager = torch.compile(flex_attention, dynamic=False, fullgraph=True, backend="eager")
    monkeypatch.setattr(masks, "_compiled", eager)
    layer = CHOSEN["bigbird"].layer(0, LAYERS)
    limit = torch._dynamo.config.recompile_limit
    for batch in range(1, limit + 3):
        query = torch.randn(batch, HEADS, SPAN, 16)
        found = layer.attend_blocks(query, query, query, 0.25, flex=masks.compiled_flex)
    torch.testing.assert_close(found, layer.attend(query, query, query, 0.25))
