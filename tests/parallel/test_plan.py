"""Plans of an exchange, checked against the dense mask, without processes."""

from __future__ import annotations

import pytest
import torch

from spattention import BandPattern
from spattention.parallel import (
    Shards,
    gathered_attention,
    plan_exchange,
    sharded_attention,
    ulysses_attention,
)
from spattention.parallel.rank_calls import rank_plan

LENGTH, HEADS = 61, 4
PATTERNS = {
    "dense": BandPattern.dense(HEADS, LENGTH),
    "exclusive": BandPattern.exclusive(HEADS, LENGTH),
    "geometric": BandPattern.shared_local(HEADS, LENGTH, widths="geometric", first=2, local=3),
    "gapped": BandPattern.gapped(HEADS, LENGTH),
    "prefix": BandPattern.exclusive(HEADS, LENGTH, prefix=4),
    "no keys but a prefix": BandPattern((((0, 4),), (), ((2, 3),), ((5, 9),)), LENGTH, prefix=9),
    "no keys": BandPattern((((0, 4), (20, 30)), (), ((2, 3),), ((5, 40),)), LENGTH),
}
DOCUMENTS = {"one": None, "packed": ((0, 5, 6, 30), (0, 22))}


def seen(pattern, key_heads, documents):
    """bool `[entries, key heads, Q, K]`: keys that some query head of the group sees."""
    masks = []
    for starts in documents or ((0,),):
        mask = torch.zeros(HEADS, LENGTH, LENGTH, dtype=torch.bool)
        for start, stop in zip(starts, [*starts[1:], LENGTH]):
            mask[:, start:stop, start:stop] = pattern.mask(stop - start)
        masks.append(mask.unflatten(0, (key_heads, -1)).any(dim=1))
    return torch.stack(masks)


@pytest.mark.parametrize("packing", DOCUMENTS)
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("layout", ["balanced", "contiguous"])
@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("name", PATTERNS)
def test_exactly_the_missing_keys_are_fetched(name, ranks, layout, key_heads, packing):
    """A key travels if a query of the rank sees it and the rank does not hold it."""
    documents = DOCUMENTS[packing]
    shards = getattr(Shards, layout)(LENGTH, ranks)
    plan = plan_exchange(PATTERNS[name], shards, key_heads, documents=documents)
    mask = seen(PATTERNS[name], key_heads, documents)
    for rank in range(ranks):
        mine = shards.positions(rank)
        wanted = mask[:, :, mine].any(dim=2)
        wanted[:, :, mine] = False
        fetched = torch.zeros_like(wanted)
        for buffer in plan.buffers[rank]:
            where = (slice(*buffer.piece.entries), slice(*buffer.piece.heads))
            assert not fetched[where][..., slice(*buffer.piece.keys)].any(), "fetched twice"
            fetched[where][..., slice(*buffer.piece.keys)] = True
        assert torch.equal(fetched, wanted)


@pytest.mark.parametrize("name", PATTERNS)
def test_both_sides_plan_the_same_pieces(name):
    plan = plan_exchange(PATTERNS[name], Shards.balanced(LENGTH, 4), 2)
    ranks = [rank_plan(plan, rank) for rank in range(4)]
    for source in range(4):
        assert ranks[source].sends[source] == ()
        for destination in range(4):
            assert ranks[source].sends[destination] == ranks[destination].receives[source]


def test_buffers_hold_what_is_fetched():
    """An eighth of the keys per head at most, where an all-gather has seven."""
    length = 65536
    pattern = BandPattern.exclusive(16, length)
    plan = plan_exchange(pattern, Shards.contiguous(length, 8), 16)
    fetched = [plan.fetched_keys(rank) / 16 / length for rank in range(8)]
    assert max(fetched) < 0.2
    assert fetched[0] == 0


def test_equal_arguments_share_a_plan():
    plans = [plan_exchange(PATTERNS["gapped"], Shards.balanced(LENGTH, 4), 2) for _ in range(2)]
    assert plans[0] is plans[1]


def test_shards_split_and_join():
    whole = torch.arange(2 * LENGTH).view(2, LENGTH)
    for shards in (
        Shards.balanced(LENGTH, 3),
        Shards.contiguous(LENGTH, 3, sizes=(0, LENGTH, 0)),
        Shards(ranges=(((0, 7), (30, LENGTH)), ((7, 30),))),
    ):
        parts = [shards.split(whole, rank) for rank in range(shards.ranks)]
        assert [part.shape[1] for part in parts] == list(shards.sizes)
        assert torch.equal(shards.join(parts), whole)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Shards(()), "`ranges` must hold at least one rank, got none"),
        (lambda: Shards((((0, 3),), ((4, 6),))), r"got \[4, 6\) where a range must start at 3"),
        (lambda: Shards((((3, 6), (0, 3)),)), "`ranges` of a rank must be sorted"),
        (lambda: Shards.balanced(8, 0), "`ranks` must be an integer of at least 1, got 0"),
        (lambda: Shards.balanced(8, 2**31), "`ranks` must be at most 65536, got 2147483648"),
        (
            lambda: Shards.contiguous(2**31, 2),
            "`length` must be at most 2147483647, got 2147483648",
        ),
        (
            lambda: Shards.contiguous(8, 10**5000),
            "`ranks` must be at most 65536, got an integer of",
        ),
        (lambda: Shards.contiguous(8, 2, sizes=(3, 4)), "`sizes` must be 2 numbers of tokens"),
        (
            lambda: plan_exchange(PATTERNS["dense"], Shards.balanced(8, 2), 3),
            "`num_key_value_heads` must divide the pattern's 4 heads, got 3",
        ),
        (
            lambda: plan_exchange(PATTERNS["dense"], Shards.balanced(8, 2), 2, documents=[(0, 9)]),
            r"`documents` must hold rising starts from 0 to below 8, got \(0, 9\)",
        ),
    ],
)
def test_bad_layouts_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([0, 5], r"must hold the starts of each batch entry, .*, got \[0, 5\]"),
        (5, "must hold the starts of each batch entry, .*, got 5"),
        ((), r"must hold the starts of each batch entry, .*, got \(\)"),
        ("x", "must hold the starts of each batch entry, .*, got 'x'"),
        (["05"], r"must hold the starts of each batch entry, .*, got \['05'\]"),
        (((0, 1.5),), r"must hold ints, got \(\(0, 1\.5\),\)"),
    ],
)
def test_bad_documents_are_named(documents, message):
    with pytest.raises(ValueError, match=f"`documents` {message}"):
        plan_exchange(PATTERNS["dense"], Shards.balanced(LENGTH, 2), 2, documents=documents)


@pytest.mark.parametrize("operator", [sharded_attention, ulysses_attention, gathered_attention])
def test_a_bad_group_is_named(operator):
    plan = plan_exchange(PATTERNS["dense"], Shards.balanced(LENGTH, 1), 4)
    rows = torch.zeros(1, 4, LENGTH, 8)
    with pytest.raises(ValueError, match="`group` must be a process group or None, got str"):
        operator(rows, rows, rows, plan, group="x")
