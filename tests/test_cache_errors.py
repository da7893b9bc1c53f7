"""What a BandStore cannot honour raises a ValueError that names the argument, the rule and the
value, and leaves the store as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_cache import PATTERNS, P, text

import spattention as spa
from spattention.cache_layout import ring_lengths

PATTERN = PATTERNS["shared_local"]
SIZES: dict[str, Any] = {"batch_size": 2, "num_key_heads": 2, "head_dim": 8}
MAKING = [
    ({"pattern": "dense"}, "`pattern` must be a BandPattern, got str"),
    ({"batch_size": "1"}, "`batch_size` must be an int, got '1'"),
    ({"batch_size": 1.5}, r"`batch_size` must be an int, got 1\.5"),
    ({"batch_size": True}, "`batch_size` must be an int, got True"),
    ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
    ({"num_key_heads": 2.0}, r"`num_key_heads` must be an int, got 2\.0"),
    ({"num_key_heads": 0}, "`num_key_heads` must be at least 1, got 0"),
    ({"num_key_heads": 3}, "`num_key_heads` must divide the pattern's 4 heads, got 3"),
    ({"head_dim": None}, "`head_dim` must be an int, got None"),
    ({"head_dim": -8}, "`head_dim` must be at least 1, got -8"),
    ({"value_dim": 0}, "`value_dim` must be at least 1, got 0"),
    ({"max_rollback": None}, "`max_rollback` must be an int, got None"),
    ({"max_rollback": -1}, "`max_rollback` must not be negative, got -1"),
    ({"slack": None}, "`slack` must be an int, got None"),
    ({"slack": 1.5}, r"`slack` must be an int, got 1\.5"),
    ({"slack": -1}, "`slack` must not be negative, got -1"),
    ({"slack": 4, "max_rollback": 5}, "`slack` is the former name of `max_rollback`.* got both"),
    ({"capacity": 0}, "`capacity` must be at least 1, got 0"),
    ({"capacity": "all"}, "`capacity` must be an int, got 'all'"),
    ({"dtype": None}, "`dtype` must be floating point, got None"),
    ({"dtype": "float32"}, "`dtype` must be floating point, got 'float32'"),
    ({"dtype": torch.int32}, r"`dtype` must be floating point, got torch\.int32"),
    ({"dtype": torch.complex64}, r"`dtype` must be floating point, got torch\.complex64"),
    ({"dtype": torch.float8_e4m3fn}, r"`dtype` must be one of .*, got torch\.float8_e4m3fn"),
    ({"device": "abacus"}, "`device` must be a device that PyTorch knows, got 'abacus'"),
    ({"device": 3.5}, r"`device` must be a device that PyTorch knows, got 3\.5"),
]
_, KEY, VALUE = text(3)
CHANGING = [
    ("append", ([1], [2]), "`key` must be a tensor, got list"),
    ("append", (KEY, None), "`value` must be a tensor, got NoneType"),
    ("append", (KEY[0], VALUE[0]), r"`key` must have the store's shape .* got \[2, 3, 8\]"),
    ("append", (KEY, VALUE[:, :, :2]), "`value` must have as many tokens as `key`, 3, got 2"),
    ("append", (KEY.double(), VALUE), r"`key` must have the store's dtype .* got torch\.float64"),
    ("append", (KEY, VALUE, torch.ones(2, 3)), r"`mask` must be bool on cpu, got torch\.float32"),
    (
        "append",
        (KEY, VALUE, torch.ones(2, 4).bool()),
        r"`mask` must be .* = \[2, 3\], got \[2, 4\]",
    ),
    ("append", (KEY, VALUE, [True]), "`mask` must be a tensor, got list"),
    ("crop", (2.7,), r"`tokens` must be an int, got 2\.7"),
    ("crop", ("2",), "`tokens` must be an int, got '2'"),
    ("crop", (True,), "`tokens` must be an int, got True"),
    ("crop", (None,), "`tokens` must be an int, got None"),
    ("crop", (-1,), "`tokens` must not be negative, got -1"),
    ("crop", (10,), "`tokens` must be at most the 9 in the store, got 10"),
    ("crop", (6,), "`tokens` must be at most the store's `max_rollback` = 5, got 6"),
    ("reorder", ([0, 1],), "`rows` must be a tensor, got list"),
    ("reorder", (torch.tensor([5, 0]),), "`rows` must be from 0 to 1, got 5"),
    ("reorder", (torch.tensor([-1, 0]),), "`rows` must be from 0 to 1, got -1"),
    ("reorder", (torch.tensor([0]),), r"`rows` must be \[B\] = \[2\], got \[1\]: use `select`"),
    ("reorder", (torch.tensor([True, False]),), r"`rows` must be int32 or int64, got torch\.bool"),
    ("select", ([0],), "`rows` must be a tensor, got list"),
    ("select", (torch.tensor([0.0]),), r"`rows` must be int32, int64 or bool, got torch\.float32"),
    ("select", (torch.tensor([[0]]),), r"`rows` must be \[rows\], got \[1, 1\]"),
    ("select", (torch.tensor(0),), r"`rows` must be \[rows\], got \[\]"),
    ("select", (torch.tensor([], dtype=torch.int64),), "must name at least one sequence, got none"),
    ("select", (torch.tensor([False, False]),), "must name at least one sequence, got none"),
    ("select", (torch.tensor([True] * 3),), r"`rows` must be \[B\] = \[2\], got \[3\]"),
    ("select", (torch.tensor([2]),), "`rows` must be from 0 to 1, got 2"),
    ("repeat", (1.5,), r"`times` must be an int, got 1\.5"),
    ("repeat", (0,), "`times` must be at least 1, got 0"),
    ("repeat", (None,), "`times` must be an int, got None"),
    ("to", ("abacus",), "`device` must be a device that PyTorch knows, got 'abacus'"),
    ("set_max_rollback", (-1,), "`tokens` must not be negative, got -1"),
]


def filled() -> spa.BandStore:
    store = spa.BandStore(PATTERN, **SIZES, max_rollback=5)
    query, key, value = text(9)
    spa.band_attention_cached(query, store, PATTERN, key, value)
    return store


def state(store: spa.BandStore) -> list[torch.Tensor]:
    return [t.clone() for t in vars(store).values() if isinstance(t, torch.Tensor)]


def check_unchanged(store: spa.BandStore, before: list[torch.Tensor]) -> None:
    after = state(store)
    assert len(after) == len(before) == 5
    for old, new in zip(before, after):
        torch.testing.assert_close(new, old, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(("options", "message"), MAKING, ids=str)
def test_a_store_names_what_it_cannot_be_made_of(options, message):
    with pytest.raises(ValueError, match=message):
        spa.BandStore(**{"pattern": PATTERN, **SIZES, **options})


@pytest.mark.parametrize(
    ("method", "arguments", "message"), CHANGING, ids=lambda value: str(value)[:40]
)
def test_a_store_names_what_it_cannot_do(method, arguments, message):
    store = filled()
    before = state(store)
    options = {"mask": arguments[2]} if len(arguments) > 2 else {}
    with pytest.raises(ValueError, match=message):
        getattr(store, method)(*arguments[:2], **options)
    check_unchanged(store, before)


def test_attention_names_what_does_not_fit():
    """Attention over a store names what does not fit."""
    query, key, value = text(4)
    mask = torch.ones(2, 4, dtype=torch.bool)
    none = {"key": None, "value": None}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("`query` must be a tensor, got NoneType", {"query": None}),
        (r"`query` must be \[B, H, length, D\], got shape \[4, 4, 8\]", {"query": query[0]}),
        ("`store` must be a BandStore, got dict", {"store": {}}),
        ("`pattern` must be the store's", {"pattern": PATTERNS["dense"]}),
        ("`pattern` must be the store's.* got None", {"pattern": None}),
        ("`key` and `value` must be given together, got one", {"value": None}),
        ("`key` must be a tensor, got list", {"key": [1]}),
        ("`key` must have as many tokens as `query`, 3, got 4", {"query": query[:, :, :3]}),
        ("`mask` must be given with `key` and `value`, got no `key`", {**none, "mask": mask}),
        (r"`mask` must be \[B, n\] = \[2, 4\], got \[2, 3\]", {"mask": mask[:, :3]}),
        (r"`mask` must be bool on cpu, got torch\.int64", {"mask": mask.long()}),
        ("`scale` must be a float, got a tensor", {"scale": torch.ones(())}),
        (r"`sinks` must be \[H\] = \[4\], got \[3\]", {"sinks": torch.zeros(3)}),
        (r"`key_start` must be int32, got torch\.int64", {"key_start": torch.zeros(2).long()}),
        (
            r"at most max_rollback \+ 1 = 6 tokens when `key` is not given .* got 7",
            {**none, "query": text(7)[0]},
        ),
    ]
    store = filled()
    before = state(store)
    for message, options in cases:
        given = {"query": query, "store": store, "pattern": PATTERN, "key": key, "value": value}
        with pytest.raises(ValueError, match=message):
            spa.band_attention_cached(**{**given, **options})
        check_unchanged(store, before)
    few = spa.BandStore(PATTERN, **SIZES)
    few.append(key[:, :, :3], value[:, :, :3])
    with pytest.raises(ValueError, match=r"at most the 3 tokens that are in the store .* got 4"):
        spa.band_attention_cached(query, few, PATTERN)


def test_sizes_have_an_upper_bound():
    """Numbers beyond what positions hold are refused before memory is asked for."""
    names = ("batch_size", "num_key_heads", "head_dim", "value_dim", "max_rollback", "slack")
    for size, shown in ((2**31, "2147483648"), (2**62, "46116.*"), (10**5000, "an integer of .*")):
        for name in (*names, "capacity"):
            with pytest.raises(
                ValueError, match=f"`{name}` must be at most {2**31 - 1}, got {shown}"
            ):
                spa.BandStore(**{"pattern": PATTERN, **SIZES, name: size})
        with pytest.raises(ValueError, match=f"`times` must be at most {2**31 - 1}, got {shown}"):
            filled().repeat(size)
        for method in ("crop", "set_max_rollback"):
            message = f"`tokens` must be at most {2**31 - 1}, got {shown}"
            with pytest.raises(ValueError, match=message):
                getattr(filled(), method)(size)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_store_of_every_largest_size_is_refused(device):
    """Counts, padding and rings are one sum, which is compared before any of them is made."""
    sizes = {"batch_size": 2**31 - 1, "max_rollback": 2**31 - 1, "head_dim": 2**31 - 1}
    given = {"pattern": PATTERN, **SIZES, **sizes, "device": device}
    with pytest.raises(ValueError, match=f"must fit into the .* GiB of {device}"):
        spa.BandStore(**given)
    for name in ("batch_size", "max_rollback"):
        if device == "cpu":
            with pytest.raises(ValueError, match=r"must fit into the .* GiB of cpu"):
                spa.BandStore(**{"pattern": PATTERN, **SIZES, name: 2**31 - 1})
    store = filled()
    before = state(store)
    with pytest.raises(ValueError, match=r"must fit into the .* GiB of cpu"):
        store.repeat(2**31 - 1)
    check_unchanged(store, before)


def test_sizes_are_checked_before_memory_is_taken():
    """Systems hand out memory that they do not have."""
    for span in (2**31 - 1,):
        wide = P.dense(4, span)
        with pytest.raises(ValueError, match=f"got rings of up to {span + 32:,} tokens, .* GiB"):
            spa.BandStore(wide, **SIZES)
        assert ring_lengths(wide, 2, capacity=10) == (42, 42)
        store = spa.BandStore(wide, **SIZES, capacity=10)
        query, key, value = text(30)
        out = spa.band_attention_cached(query, store, wide, key, value)
        torch.testing.assert_close(out, spa.band_attention(query, key, value, P.dense(4, 30)))
        before, room = state(store), store.capacity
        with pytest.raises(ValueError, match="give a `capacity`"):
            store.reserve(2**50)
        check_unchanged(store, before)
        assert store.capacity == room
