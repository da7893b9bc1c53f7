"""Key/value groups dealt to ranks."""

from __future__ import annotations

import itertools

import pytest
import torch

from spattention import BandPattern, band_attention
from spattention.parallel import deal, deal_heads, deal_pattern, undeal_heads
from spattention.parallel.deal import group_work, head_order

SPAN = 64


def largest_share(work, order, ranks):
    size = len(order) // ranks
    parts = [order[first : first + size] for first in range(0, len(order), size)]
    return max(sum(work[group] for group in part) for part in parts)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("widths", ["uniform", "geometric", "equal_work"])
def test_dealt_work_is_near_the_best(ranks, widths):
    """Compared with every order of eight heads, at most two per cent above the best."""
    pattern = BandPattern.shared_local(8, SPAN, widths=widths, local=3)
    work = group_work(pattern, 8)
    order = deal(pattern, ranks, 8)
    assert sorted(order) == list(range(8))
    size = 8 // ranks
    best = min(
        largest_share(work, each, ranks)
        for each in itertools.permutations(range(8))
        if all(list(each[r : r + size]) == sorted(each[r : r + size]) for r in range(0, 8, size))
    )
    assert largest_share(work, order, ranks) <= 1.02 * best


def test_equal_heads_stay_in_order():
    assert deal(BandPattern.dense(8, SPAN), 4, 4) == (0, 1, 2, 3)


def test_whole_groups_are_dealt():
    """Query heads stay with the key/value head that they read."""
    pattern = BandPattern.exclusive(8, SPAN, widths="geometric", first=2, prefix=3)
    order = deal(pattern, 2, 4)
    dealt = deal_pattern(pattern, order)
    assert [pattern.intervals[h] for h in head_order(order, 8)] == list(dealt.intervals)
    assert dealt.prefix == pattern.prefix
    for place, group in enumerate(order):
        assert dealt.intervals[2 * place : 2 * place + 2] == (
            pattern.intervals[2 * group],
            pattern.intervals[2 * group + 1],
        )


def test_dealt_weights_give_the_same_output():
    pattern = BandPattern.exclusive(4, SPAN, widths="geometric", first=2)
    order = (1, 0)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 20, 8, generator=random, dtype=torch.float64)
    q, k, v, o = (
        torch.randn(rows, columns, generator=random, dtype=torch.float64)
        for rows, columns in ((12, 8), (6, 8), (6, 8), (8, 12))
    )

    def layer(q, k, v, o, pattern):
        heads = [(x @ w.T).unflatten(-1, (-1, 3)).transpose(1, 2) for w in (q, k, v)]
        return band_attention(*heads, pattern).transpose(1, 2).flatten(2) @ o.T

    dealt = [deal_heads(w, order) for w in (q, k, v)] + [deal_heads(o, order, 1)]
    found = layer(*dealt, deal_pattern(pattern, order))
    torch.testing.assert_close(found, layer(q, k, v, o, pattern), rtol=0, atol=1e-12)
    assert not torch.equal(dealt[0], q)
    assert torch.equal(undeal_heads(dealt[0], order), q)
    assert torch.equal(undeal_heads(dealt[3], order, 1), o)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 4), "`ranks` must divide `num_key_value_heads` = 4, so that .* got 3"),
        ((0, 4), "`ranks` must be an integer of at least 1, got 0"),
        ((2, 3), "`num_key_value_heads` must divide the pattern's 8 heads, got 3"),
        ((2, 4.0), r"`num_key_value_heads` must be an integer of at least 1, got 4\.0"),
    ],
)
def test_deal_names_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        deal(BandPattern.exclusive(8, SPAN), *arguments)


def test_deal_names_a_bad_pattern_and_order():
    with pytest.raises(ValueError, match="`pattern` must be a BandPattern, got tuple"):
        deal((), 2, 4)
    with pytest.raises(ValueError, match="`order` must name each of the 2 key/value heads once"):
        deal_pattern(BandPattern.dense(4, SPAN), (0, 0))
    with pytest.raises(ValueError, match="`tensor` must have a multiple of 2 key/value heads"):
        deal_heads(torch.zeros(3, 2), (1, 0))
