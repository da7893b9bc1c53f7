"""Messages and tables of an exchange, all ranks in one process."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock

import in_turns
import pytest
import torch

from spattention import BandPattern
from spattention.parallel import Shards, exchange, plan_exchange
from spattention.parallel.work import rank_plan

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


class Stream:
    """Records what is asked of a stream, in order, in a list of all streams."""

    def __init__(self, name: str, asked: list[str]) -> None:
        self.name, self.asked, self.events = name, asked, 0

    def wait_stream(self, other: Stream) -> None:
        self.asked.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> SimpleNamespace:
        self.events += 1
        name = f"event {self.events} of {self.name}"
        self.asked.append(name)
        return SimpleNamespace(
            name=name, wait=lambda other: self.asked.append(f"{other.name} waits for {name}")
        )

    def wait_event(self, event: SimpleNamespace) -> None:
        event.wait(self)


def test_attention_follows_an_exchange_that_is_next(monkeypatch):
    """On GPUs: what comes later on the current stream starts after NCCL's programs, or they would
    wait for its own on every rank."""
    asked: list[str] = []
    current, other = Stream("attention", asked), Stream("exchange", asked)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(exchange, "_exchange_stream", lambda device: other)
    monkeypatch.setattr(exchange.dist, "get_backend", lambda group: "nccl")
    monkeypatch.setattr(
        exchange.dist, "all_to_all_single", lambda *a, **k: asked.append("messages")
    )
    sent = MagicMock(is_cuda=True, element_size=lambda: 2)
    pending = exchange.start_all_to_all(sent, MagicMock(), [0, 4], [0, 4], None)
    asked.append("attention")
    pending.wait()
    assert asked == [
        "exchange waits for attention",
        "event 1 of exchange",
        "messages",
        "event 2 of exchange",
        "attention waits for event 1 of exchange",
        "attention",
        "attention waits for event 2 of exchange",
    ]


def test_only_documents_are_whole_calls():
    """Other calls on own keys run in short programs, which an exchange can start beside."""
    shards = Shards.balanced(LENGTH, 2)
    for documents, whole in ((None, 0), ([(0, 10, 90)], 1)):
        plan = plan_exchange(GEOMETRIC, shards, HEADS, documents=documents)
        calls = rank_plan(plan, 0).local
        assert sum(call.is_whole for call in calls) == whole
        assert all(call.starts for call in calls if call.is_whole)
