"""Messages and tables of an exchange, all ranks in one process."""

from __future__ import annotations

import in_turns
import pytest
import torch

from spattention import BandPattern
from spattention.parallel import Shards, exchange, plan_exchange, runs
from spattention.parallel.rank_calls import rank_plan

LENGTH, HEADS = 96, 4
GEOMETRIC = BandPattern.shared_local(HEADS, LENGTH, widths="geometric", first=3, local=9)


def shards_of(tensors, shards, rank):
    return [shards.split(each, rank, dim=2) for each in tensors]


def drawn(*widths: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = [(2, HEADS, LENGTH, width) for width in widths]
    return [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]


def received(plan, rank: int, key, value) -> tuple[exchange.Pending, list[exchange.Pair]]:
    """What a rank of two receives, and its tables; `key` and `value` are whole."""
    parts = [shards_of((key, value), plan.shards, each) for each in range(2)]
    wires = in_turns.Wires()
    for each in (1 - rank, rank):
        trip = exchange.Exchange(plan, rank_plan(plan, each), *parts[each], None)
        if each == rank:
            wires = in_turns.Wires(wires)
        wires.connect(each)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exchange, "start_all_to_all", wires.send)
            if each == rank:
                wires.before[rank, 0] = torch.empty(0, dtype=key.dtype), [0, 0]
            pending = trip.start(*parts[each])
    return pending, trip.finish(pending, *parts[rank])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("token_major", [False, True])
def test_tables_hold_the_keys_at_their_places(rank, token_major):
    """Keys of every part of a table, and zeros between; values are wider than keys."""
    key, value = drawn(4, 6)
    if token_major:  # as models hand them over
        key, value = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (key, value))
    plan = plan_exchange(GEOMETRIC, Shards.balanced(LENGTH, 2), HEADS)
    _, tables = received(plan, rank, key, value)
    work = rank_plan(plan, rank)
    assert len(tables) == len(work.tables) > 0
    for table, pair in zip(work.tables, tables):
        for found, whole in zip(pair, (key, value)):
            wanted = torch.zeros_like(found)
            for part in table.parts:
                heads = slice(*(head - table.heads[0] for head in part.piece.heads))
                keys = whole[:, slice(*part.piece.heads), slice(*part.piece.keys)]
                wanted[:, heads, part.offset : part.offset + keys.shape[2]] = keys
            torch.testing.assert_close(found, wanted, rtol=0.0, atol=0.0)


def test_a_table_that_is_a_message_is_not_copied():
    """Dense attention of contiguous shards: the second rank lacks all keys of the first."""
    key, value = drawn(4, 4)
    plan = plan_exchange(BandPattern.dense(HEADS, LENGTH), Shards.contiguous(LENGTH, 2), HEADS)
    pending, (table,) = received(plan, 1, key, value)
    for found, whole in zip(table, (key, value)):
        torch.testing.assert_close(found, whole[:, :, : LENGTH // 2], rtol=0.0, atol=0.0)
        storage = found.untyped_storage().data_ptr()
        assert storage == pending.received.untyped_storage().data_ptr()


def test_a_message_and_a_table_are_one_copy_each(monkeypatch):
    """Copies cost launches and time that no kernel hides; so do tables made one by one."""
    key, value = drawn(4, 4)
    plan = plan_exchange(GEOMETRIC, Shards.balanced(LENGTH, 2), HEADS)
    joined = []
    stock = exchange._joined
    monkeypatch.setattr(exchange, "_joined", lambda *a: joined.append(1) or stock(*a))
    monkeypatch.setattr(torch.Tensor, "copy_", None)
    received(plan, 0, key, value)
    assert len(joined) == 3, "each rank packs once, and one of them fills its tables"


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("layout", ["balanced", "contiguous"])
def test_no_key_is_twice_in_a_message_or_a_table(ranks, layout):
    """Gradients of a message, and of a table's own keys, are added in one launch: two sums of one
    key in it would race on a GPU.
    """
    two = BandPattern(tuple(((0, 5 + h), (20 + h, 60)) for h in range(HEADS)), LENGTH, prefix=3)
    for pattern in (GEOMETRIC, two):
        for documents in (None, [[0, 31, 64], [0, 50]]):
            shards = getattr(Shards, layout)(LENGTH, ranks)
            plan = plan_exchange(pattern, shards, HEADS // 2, documents=documents)
            for rank in range(ranks):
                made = runs.layout(plan, rank_plan(plan, rank), 2)
                own = [[k.there for k in table if k.source == rank] for table in made.tables]
                for message in (*made.sends, *own):
                    keys = [
                        (run.entry, run.head, run.first + place)
                        for run in message
                        for place in range(run.length)
                    ]
                    assert len(keys) == len(set(keys))


def test_gradients_of_a_message_are_one_launch(monkeypatch):
    """Adding them head by head took as many launches as runs."""
    calls = []
    stock = exchange.add_each
    monkeypatch.setattr(exchange, "add_each", lambda *given: calls.append(stock(*given)))
    key, value = drawn(4, 4)
    plan = plan_exchange(GEOMETRIC, Shards.balanced(LENGTH, 2), HEADS)
    in_turns.results(plan, [key, key, value, value])
    passes = in_turns.PASSES
    tables = sum(
        any(link.source == rank for link in table)
        for rank in range(2)
        for table in runs.layout(plan, rank_plan(plan, rank), 2).tables
    )
    assert len(calls) == passes * (tables + 2)
