"""Reformer against one query at a time, in words of the paper."""

from __future__ import annotations

import pytest
import torch
from small_models import HEADS

from spattention.baselines import Reformer
from spattention.baselines.reformer import hashed_attention

close = torch.testing.assert_close


def drawn(length: int, buckets: int, rounds: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    size = (2, HEADS, length, 8)
    shared = torch.randn(size, generator=generator, dtype=torch.float64)
    value = torch.randn(size, generator=generator, dtype=torch.float64)
    table = torch.randint(0, buckets, (rounds, *size[:3]), generator=generator)
    return shared, value, table


def one_by_one(shared, value, buckets, chunk, scale):
    """For each query the set of keys that any round lets it see, and one softmax over them."""
    out = torch.zeros_like(value)
    rounds, rows, heads, length = buckets.shape
    for row in range(rows):
        for head in range(heads):
            seen = [set() for _ in range(length)]
            for number in range(rounds):
                mine = buckets[number, row, head].tolist()
                order = sorted(range(length), key=lambda p: (mine[p], p))
                chunk_of = {p: place // chunk for place, p in enumerate(order)}
                for i in range(length):
                    for j in range(i + 1):
                        near = chunk_of[i] - chunk_of[j] in (0, 1)
                        if mine[i] == mine[j] and near:
                            seen[i].add(j)
            for i in range(length):
                keys = sorted(seen[i] - {i}) or [i]
                vectors = shared[row, head, keys]
                units = vectors / vectors.norm(dim=-1, keepdim=True)
                scores = scale * 8**0.5 * (units @ shared[row, head, i])
                out[row, head, i] = scores.softmax(dim=0) @ value[row, head, keys]
    return out


@pytest.mark.parametrize(
    ("length", "chunk", "buckets", "rounds"),
    [(24, 4, 3, 1), (29, 4, 6, 3), (29, 7, 2, 2), (5, 8, 2, 2), (30, 3, 1, 2), (1, 4, 2, 1)],
)
def test_outputs_are_those_of_one_query_at_a_time(length, chunk, buckets, rounds):
    shared, value, table = drawn(length, buckets, rounds)
    found = hashed_attention(shared, value, table, chunk, 0.4)
    close(found, one_by_one(shared, value, table, chunk, 0.4), rtol=0.0, atol=1e-11)


def test_gradients_are_those_of_one_query_at_a_time():
    shared, value, table = drawn(19, 3, 2)
    gradient = torch.randn_like(value)
    found, wanted = (
        torch.autograd.grad(
            call(s := shared.clone().requires_grad_(), v := value.clone().requires_grad_(),
                 table, 4, 0.4),
            (s, v), gradient,
        )
        for call in (hashed_attention, one_by_one)
    )  # fmt: skip
    for mine, other in zip(found, wanted):
        close(mine, other, rtol=0.0, atol=1e-11)


def test_an_edit_within_buckets_moves_nothing_before():
    """An edit moves nothing before it when buckets stay."""
    shared, value, table = drawn(40, 4, 3)
    before = hashed_attention(shared, value, table, 4, 0.4)
    for t in (0, 17, 39):
        edited, other = shared.clone(), value.clone()
        edited[:, :, t] += 1.0
        other[:, :, t] += 1.0
        after = hashed_attention(edited, other, table, 4, 0.4)
        assert torch.equal(after[:, :, :t], before[:, :, :t])
        assert not torch.equal(after[:, :, t:], before[:, :, t:])


def test_vectors_in_the_same_direction_share_buckets():
    layer = Reformer(HEADS, 64, rounds=3, chunk=8, buckets=16).layer(1, 4)
    shared, *_ = drawn(50, 2, 1)
    buckets = layer.hash(shared)
    assert buckets.shape == (3, 2, HEADS, 50)
    assert 0 <= buckets.min() <= buckets.max() < 16
    assert torch.equal(layer.hash(2.5 * shared), buckets)
    assert torch.equal((buckets + 8) % 16, layer.hash(-shared))  # the other side of each rotation
    assert not torch.equal(buckets[0], buckets[1])
    near = layer.hash(shared + 0.05 * torch.randn_like(shared))
    far = layer.hash(torch.randn_like(shared))
    assert (near == buckets).double().mean() > 0.8
    assert (far == buckets).double().mean() < 0.2
    again = Reformer(HEADS, 64, rounds=3, chunk=8, buckets=16)
    assert torch.equal(again.layer(1, 4).hash(shared), buckets)
    assert not torch.equal(again.layer(2, 4).hash(shared), buckets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_near_float64_in_other_types(dtype):
    shared, value, table = drawn(40, 4, 3)
    shared, value = shared.to(dtype), value.to(dtype)
    found = hashed_attention(shared, value, table, 4, 0.4)
    assert found.dtype == dtype
    wanted = hashed_attention(shared.double(), value.double(), table, 4, 0.4)
    # Scores up to 10 and weights, each rounded once to the input's type.
    close(found.double(), wanted, rtol=0.0, atol=20 * torch.finfo(dtype).eps)


def test_weights_give_the_outputs():
    layer = Reformer(HEADS, 64, rounds=3, chunk=8, buckets=8).layer(0, 2)
    shared, value, _ = drawn(50, 2, 1)
    weights = layer.weights(shared, shared, 0.4, 20, 50)
    wanted = layer.attend(shared, shared, value, 0.4)[:, :, 20:]
    close(weights.double() @ value, wanted, rtol=0.0, atol=1e-5)


def test_pairs_count_what_is_compared():
    assert Reformer(8, 1024).pairs(1024, 8) == 8 * 4 * (64 * 64 + 15 * 64 * 128)
