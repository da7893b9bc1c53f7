"""The definitions of DESIGN section 2, by counting distances."""

import dataclasses
import json
import pickle
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spattention import BandPattern
from spattention.choice import named_pattern

P = BandPattern
sizes = st.tuples(st.integers(1, 64), st.integers(1, 5000))
small = st.tuples(st.integers(1, 20), st.integers(1, 80))
widths = st.sampled_from(["uniform", "geometric", "equal_work"])


def every_pattern(num_heads: int, span: int) -> list[BandPattern]:
    named = [
        BandPattern.dense(num_heads, span),
        BandPattern.sliding_window(num_heads, span, max(1, span // 3)),
        BandPattern.gapped(num_heads, span),
        BandPattern.local_only(num_heads, span),
    ]
    for rule in ("uniform", "geometric", "equal_work"):
        named.append(BandPattern.exclusive(num_heads, span, widths=rule))
        named.append(BandPattern.shared_local(num_heads, span, widths=rule))
    for groups in (g for g in range(1, num_heads + 1) if num_heads % g == 0):
        named += grouped(num_heads, span, groups)
    prefixes = (min(span, 1 + place % 7) for place in range(len(named)))
    return named + [replace(pattern, prefix=p) for pattern, p in zip(named, prefixes)]


def grouped(num_heads: int, span: int, groups: int) -> list[BandPattern]:
    """Every pattern that takes `kv_heads`."""
    return [
        BandPattern.exclusive(num_heads, span, kv_heads=groups),
        BandPattern.exclusive(num_heads, span, widths="geometric", kv_heads=groups),
        BandPattern.shared_local(num_heads, span, kv_heads=groups),
        BandPattern.shared_local(num_heads, span, widths="geometric", kv_heads=groups),
        BandPattern.shared_local(num_heads, span, widths="equal_work", kv_heads=groups),
        BandPattern.gapped(num_heads, span, kv_heads=groups),
        BandPattern.local_only(num_heads, span, kv_heads=groups),
    ]


def distances(head) -> list[int]:
    return [d for near, far in head for d in range(near, far)]


@given(sizes, widths)
@settings(max_examples=60, deadline=None)
def test_exclusive_covers_each_distance_once(size, rule):
    """Exclusive covers each distance in exactly one head."""
    pattern = BandPattern.exclusive(*size, widths=rule)
    seen = Counter(d for head in pattern.intervals for d in distances(head))
    assert seen == Counter(range(size[1]))


@given(sizes)
@settings(max_examples=60, deadline=None)
def test_uniform_widths_differ_by_at_most_one(size):
    """Uniform widths differ by at most one and the wider come first."""
    counts = [len(distances(head)) for head in BandPattern.exclusive(*size).intervals]
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)


@given(sizes)
@settings(max_examples=60, deadline=None)
def test_shared_local_is_the_band_and_the_local_window(size):
    span = size[1]
    bands = BandPattern.exclusive(*size).intervals
    for head, band in zip(BandPattern.shared_local(*size).intervals, bands):
        local = min(span, len(distances(band)) + 1)
        assert set(distances(head)) == set(distances(band)) | set(range(local))


@given(sizes)
@settings(max_examples=60, deadline=None)
def test_the_ablations(size):
    """The ablations keep half of the band or the local window."""
    span = size[1]
    gapped, local_only = BandPattern.gapped(*size), BandPattern.local_only(*size)
    for h, band in enumerate(BandPattern.exclusive(*size).intervals):
        kept = distances(band)
        assert distances(gapped.intervals[h]) == kept[: len(kept) // 2]
        assert distances(local_only.intervals[h]) == list(range(min(span, len(kept) + 1)))


@given(sizes)
@settings(max_examples=60, deadline=None)
def test_equal_work_bands_differ_in_pairs_by_little(size):
    span = size[1]
    pairs = BandPattern.exclusive(*size, widths="equal_work").pairs(span)
    # Rounding moves an edge by half a token, and a token at distance d has span - d pairs.
    assert max(pairs) - min(pairs) <= 2 * span + 2


def test_geometric_edges_are_those_of_the_formula():
    pattern = BandPattern.exclusive(8, 8192, widths="geometric")
    edges = [0] + [round(64 * (8192 / 64) ** (i / 7)) for i in range(7)] + [8192]
    assert pattern.intervals == tuple((band,) for band in zip(edges, edges[1:]))


@pytest.mark.parametrize(("span", "local"), [(8192, 256), (4096, 128), (1024, 128), (64, 64)])
def test_geometric_local_window_grows(span, local):
    """The geometric local window grows with the span."""
    assert BandPattern.shared_local(8, span, widths="geometric").intervals[0] == ((0, local),)


def test_geometric_shared_local_opens_locally():
    """Geometric shared local opens with the local window."""
    pattern = BandPattern.shared_local(16, 4096, widths="geometric")
    assert pattern.intervals[:4] == (((0, 128),),) * 4
    assert pattern.intervals[-1][0] == (0, 128)
    assert pattern.intervals[-1][-1][1] == 4096


def test_geometric_edges_with_more_heads_than_tokens():
    pattern = BandPattern.exclusive(6, 3, widths="geometric")
    assert pattern.intervals == (((0, 1),), ((1, 2),), ((2, 3),), (), (), ())


def test_one_geometric_head_is_dense():
    pattern = BandPattern.exclusive(1, 100, widths="geometric")
    assert pattern == BandPattern.dense(1, 100)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 400))
@settings(max_examples=30, deadline=None)
def test_query_heads_of_a_group_share_its_band(groups, repeats, span):
    """A pattern with `kv_heads=G` is the pattern of G heads, each band repeated H // G times."""
    bands = grouped(groups, span, groups)
    for shared, few in zip(grouped(groups * repeats, span, groups), bands):
        expected = [few.intervals[h // repeats] for h in range(groups * repeats)]
        assert list(shared.intervals) == expected


def test_a_band_per_key_value_head_saves_their_number():
    dense = BandPattern.dense(8, 1024).pairs(1024)
    grouped_bands = BandPattern.exclusive(8, 1024, kv_heads=4).pairs(1024)
    assert sum(dense) == 4 * sum(grouped_bands)


def test_commands_name_bands_per_key_value_head():
    named = named_pattern("shared_local:widths=geometric,kv_heads=4", 8, 4096)
    assert named == BandPattern.shared_local(8, 4096, widths="geometric", kv_heads=4)
    assert named_pattern("gapped:kv_heads=2", 8, 64) == BandPattern.gapped(8, 64, kv_heads=2)
    with pytest.raises(ValueError, match="divide `num_heads` = 8, got 3"):
        named_pattern("exclusive:kv_heads=3", 8, 64)
    with pytest.raises(ValueError, match=r"options of `sliding_window` .*got 'kv_heads=4'"):
        named_pattern("sliding_window:kv_heads=4", 8, 64)


def test_explicit_edges_and_windows_are_per_band():
    pattern = BandPattern.shared_local(4, 16, widths=[0, 4, 16], local=[1, 2], kv_heads=2)
    assert pattern.intervals == (((0, 4),), ((0, 4),), ((0, 2), (4, 16)), ((0, 2), (4, 16)))
    assert pattern.to_dict()["recipe"]["kv_heads"] == 2
    assert repr(pattern).endswith("local=[1, 2], kv_heads=2)")


@pytest.mark.parametrize(
    ("widths", "local", "expected"),
    [
        ([0, 4, 4, 16], 2, (((0, 4),), ((0, 2),), ((0, 2), (4, 16)))),
        ([0, 4, 8, 16], [0, 4, 20], (((0, 4),), ((0, 8),), ((0, 16),))),
        ("uniform", 0, (((0, 6),), ((6, 11),), ((11, 16),))),
    ],
)
def test_explicit_edges_and_local_windows(widths, local, expected):
    assert BandPattern.shared_local(3, 16, widths=widths, local=local).intervals == expected


@given(st.tuples(st.integers(1, 12), st.integers(1, 320)), st.integers(0, 300), st.integers(0, 40))
@settings(max_examples=20, deadline=None)
def test_pairs_count_the_mask(size, seq_len, queries):
    for pattern in every_pattern(*size):
        assert pattern.pairs(seq_len) == tuple(pattern.mask(seq_len).sum((1, 2)).tolist())
        last = pattern.mask(min(queries, seq_len), seq_len)
        assert torch.equal(last, pattern.mask(seq_len)[:, seq_len - last.shape[1] :])


def test_mask_is_the_definition():
    pattern = BandPattern(intervals=(((0, 2),), ((0, 1), (3, 5)), ()), span=6)
    mask = pattern.mask(3, 9, query_start=4)
    for h, head in enumerate(pattern.intervals):
        for i in range(3):
            for j in range(9):
                seen = any(near <= 4 + i - j < far for near, far in head)
                assert bool(mask[h, i, j]) == seen


def test_the_prefix_is_seen_at_every_distance():
    """Heads with intervals see the first keys too, never a later one; heads without stay empty."""
    pattern = P(intervals=(((0, 2),), ((0, 1), (3, 5)), ()), span=6, prefix=2)
    mask = pattern.mask(7, 12, query_start=1)
    for h, head in enumerate(pattern.intervals):
        for i in range(7):
            for j in range(12):
                d = 1 + i - j
                seen = any(near <= d < far for near, far in head)
                seen = seen or (bool(head) and j < 2 and d >= 0)
                assert bool(mask[h, i, j]) == seen


def test_every_constructor_takes_a_prefix():
    made = [
        P.dense(4, 16, prefix=3),
        P.sliding_window(4, 16, 2, prefix=3),
        P.exclusive(4, 16, prefix=3),
        P.shared_local(4, 16, kv_heads=2, prefix=3),
        P.gapped(4, 16, prefix=3),
        P.local_only(4, 16, prefix=3),
        P((((0, 4),),) * 4, 16, prefix=3),
    ]
    for pattern in made:
        bare = replace(pattern, prefix=0)
        assert pattern.prefix == 3
        assert pattern.intervals == bare.intervals
        assert pattern != bare
        assert hash(pattern) != hash(bare)
        assert "prefix=3" in repr(pattern)
        assert "prefix" not in repr(bare)
        assert pattern.heads(1, 3).prefix == 3
        assert pattern.mask(16)[:, :, 0].all()
        assert pattern.mask(5, 40)[:, :, :3].all()  # beyond the span


def test_commands_name_a_prefix():
    named = named_pattern("shared_local:widths=geometric,kv_heads=4,prefix=4", 8, 4096)
    assert named == P.shared_local(8, 4096, widths="geometric", kv_heads=4, prefix=4)
    assert named_pattern("sliding_window:window=8,prefix=2", 4, 64).prefix == 2
    with pytest.raises(ValueError, match="`prefix` must be between 0 and `span` = 64, got 65"):
        named_pattern("exclusive:prefix=65", 8, 64)


def test_version_2_is_written_with_a_prefix_alone():
    """Files without a prefix stay readable by earlier versions."""
    bare, prefixed = P.exclusive(2, 8), P.exclusive(2, 8, prefix=3)
    assert bare.to_dict()["version"] == 1
    assert "prefix" not in bare.to_dict()
    assert prefixed.to_dict()["version"] == 2
    assert prefixed.to_dict()["prefix"] == 3
    assert P.from_dict(prefixed.to_dict()).prefix == 3
    assert P.from_dict(bare.to_dict() | {"version": 2, "prefix": 0}) == bare


def test_a_score_does_not_depend_on_the_input_length():
    pattern = BandPattern.shared_local(4, 64)
    assert torch.equal(pattern.mask(100)[:, :40, :40], pattern.mask(40))


@given(small)
@settings(max_examples=30, deadline=None)
def test_round_trips_through_json(size):
    for pattern in every_pattern(*size):
        data = json.loads(json.dumps(pattern.to_dict()))
        back = BandPattern.from_dict(data)
        assert back == pattern
        assert repr(back) == repr(pattern)
        assert eval(repr(pattern)) == pattern


def test_equality_looks_at_span_intervals_and_prefix():
    named = BandPattern.exclusive(2, 8)
    custom = BandPattern(intervals=(((0, 4),), ((4, 8),)), span=8)
    assert named == custom
    assert hash(named) == hash(custom)
    assert named != BandPattern(intervals=custom.intervals, span=9)
    assert len({named, custom}) == 1


def test_patterns_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BandPattern.dense(2, 8).span = 9


def test_heads_slices_for_tensor_parallelism():
    pattern = BandPattern.shared_local(8, 1024)
    part = pattern.heads(4, 8)
    assert part.intervals == pattern.intervals[4:]
    assert repr(part).endswith(".heads(4, 8)")
    assert part.heads(1, 3).intervals == pattern.intervals[5:7]
    assert eval(repr(part.heads(1, 3))) == part.heads(1, 3)


def test_constructor_keeps_its_former_name():
    pattern = BandPattern.dense(2, 8)
    assert pattern.recipe == pattern.constructor == {"name": "dense", "num_heads": 2, "span": 8}
    assert pattern.to_dict()["recipe"] == pattern.constructor


def test_a_recipe_is_plain_whatever_it_was_made_from():
    numpy = pytest.importorskip("numpy")
    edges = numpy.array([0, 4, 16])
    made = BandPattern.shared_local(numpy.int64(2), 16, widths=edges, local=(i for i in (1, 2)))
    plain = BandPattern.shared_local(2, 16, widths=[0, 4, 16], local=[1, 2])
    assert made == plain
    assert repr(made) == repr(plain)
    assert json.loads(json.dumps(made.to_dict())) == plain.to_dict()
    assert pickle.loads(pickle.dumps(made)) == made


@pytest.mark.parametrize(
    "recipe",
    ["x", 5, {"a": 1}, {"name": 3}, {"name": "dense", "heads": 5}, {"name": "x", "y": {"z": 1}}],
)
def test_a_foreign_recipe_is_left_out(recipe):
    data = BandPattern.dense(2, 8).to_dict() | {"recipe": recipe}
    pattern = BandPattern.from_dict(data)
    assert pattern == BandPattern.dense(2, 8)
    assert eval(repr(pattern)) == pattern
    assert pattern.heads(0, 1).to_dict()["span"] == 8


@pytest.mark.parametrize(
    "edited",
    [
        {"local": 3}, {"num_heads": 4}, {"span": 32}, {"prefix": 3}, {"heads": [0, 1]},
        {"heads": [4, 9]}, {"num_heads": 2**20, "heads": [0, 2]}, {"local": "wide"},
    ],
)  # fmt: skip
def test_a_recipe_that_gives_other_bands_is_left_out(edited):
    """It would be printed as what runs."""
    pattern = BandPattern.shared_local(2, 16, prefix=2)
    data = pattern.to_dict()
    data["recipe"] = data["recipe"] | edited
    with pytest.warns(UserWarning, match="`recipe` must give its `intervals`, got .*shared_local"):
        found = BandPattern.from_dict(data)
    assert found == pattern
    assert found.constructor is None
    assert eval(repr(found)) == pattern


@pytest.mark.parametrize("more", [{}, {"prefix": 2}, {"depth": 1}, {"name": "of_later_versions"}])
def test_a_recipe_that_gives_the_bands_is_kept(more):
    """And what another version may have written."""
    pattern = BandPattern.exclusive(8, 1024, kv_heads=2, widths=[0, 9, 1024], prefix=2)
    for part in (pattern, pattern.heads(2, 6), pattern.heads(2, 6).heads(1, 3)):
        data = json.loads(json.dumps(part.to_dict()))
        data["recipe"] |= more
        found = BandPattern.from_dict(data)
        assert found == part
        assert found.constructor == data["recipe"]


def test_flat_pads_each_head_to_two_intervals():
    pattern = BandPattern(intervals=(((0, 2),), ((0, 1), (3, 5)), ()), span=6)
    assert pattern.flat == (0, 2, 0, 0, 0, 1, 3, 5, 0, 0, 0, 0)


V2 = {"version": 2, "span": 4, "intervals": [[[0, 4]]]}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: P((), 8), "`intervals` must hold at least one head, got none"),
        (lambda: P((((3, 3),),), 8), r"`intervals` of head 0 must not be empty .*got \(3, 3\)"),
        (lambda: P((((5, 3),),), 8), r"`intervals` of head 0 must not be empty .*got \(5, 3\)"),
        (lambda: P((((-1, 3),),), 8), r"`intervals` of head 0 must not be negative, got \(-1, 3\)"),
        (lambda: P((((0, 9),),), 8), r"must end within `span` = 8, got \(0, 9\)"),
        (
            lambda: P((((0, 3), (2, 5)),), 8),
            r"must be sorted and apart .*got \(\(0, 3\), \(2, 5\)\)",
        ),
        (lambda: P((((0, 3), (3, 5)),), 8), "must be sorted and apart"),
        (lambda: P((((4, 5), (0, 2)),), 8), "must be sorted and apart"),
        (lambda: P((((0, 1), (2, 3), (4, 5)),), 8), "of head 0 must be at most 2, got 3"),
        (lambda: P((((0, 1.5),),), 8), r"`intervals` must be an integer, got 1\.5"),
        (lambda: P((5,), 8), r"`intervals` must be, per head, a sequence of pairs"),
        (lambda: P((((0, 1),),), 0), "`span` must be at least 1, got 0"),
        (lambda: P.dense(0, 8), "`num_heads` must be at least 1, got 0"),
        (lambda: P.exclusive(4, -1), "`span` must be at least 1, got -1"),
        (lambda: P.exclusive(True, 4), "`num_heads` must be an integer, got True"),
        (lambda: P.sliding_window(2, 8, 9), "`window` must be between 1 and `span` = 8, got 9"),
        (lambda: P.sliding_window(2, 8, 0), "`window` must be between 1 and `span` = 8, got 0"),
        (lambda: P.exclusive(2, 8, widths="wide"), "`widths` must be .* got 'wide'"),
        (lambda: P.exclusive(2, 8, widths=3), "`widths` must be a sequence of integers, got 3"),
        (lambda: P.exclusive(2, 8, widths=None), "`widths` must be a sequence of integers"),
        (
            lambda: P.shared_local(2, 8, local="1"),
            "`local` must be a sequence of integers, got '1'",
        ),
        (lambda: P.dense(2, 8).mask(2, 2, query_start=0.5), "`query_start` must be an integer"),
        (
            lambda: P.exclusive(2, 8, widths=[0, 8]),
            r"`widths` must hold one edge more than bands = 3 .*got 2",
        ),
        (lambda: P.exclusive(2, 8, widths=[0, 9, 8]), "must run from 0 to `span` = 8 and never"),
        (lambda: P.exclusive(2, 8, widths=[1, 4, 8]), "must run from 0 to `span` = 8 and never"),
        (lambda: P.exclusive(2, 8, first=2), '`first` is only for `widths="geometric"`'),
        (
            lambda: P.exclusive(2, 8, widths="geometric", first=9),
            "`first` must be between 1 and `span` = 8, got 9",
        ),
        (
            lambda: P.exclusive(9, 64, kv_heads=2),
            "`kv_heads` must be at least 1 and divide `num_heads` = 9, got 2",
        ),
        (lambda: P.shared_local(4, 64, kv_heads=8), "divide `num_heads` = 4, got 8"),
        (lambda: P.gapped(4, 64, kv_heads=0), "`kv_heads` must be at least 1 .*got 0"),
        (lambda: P.local_only(4, 64, kv_heads=-2), "`kv_heads` must be at least 1 .*got -2"),
        (lambda: P.gapped(4, 64, kv_heads=2.0), r"`kv_heads` must be an integer, got 2\.0"),
        (lambda: P.exclusive(4, 64, kv_heads=True), "`kv_heads` must be an integer, got True"),
        (
            lambda: P.exclusive(4, 8, widths=[0, 1, 2, 4, 8], kv_heads=2),
            "`widths` must hold one edge more than bands = 3 edges, got 5",
        ),
        (
            lambda: P.shared_local(4, 8, local=[1, 2, 3, 4], kv_heads=2),
            r"`local` must be one size or one per band \(2\), got 4",
        ),
        (lambda: P.shared_local(2, 8, local=-1), "`local` must not be negative, got -1"),
        (lambda: P.shared_local(2, 8, local=[1]), r"`local` must be .*one per head \(2\), got 1"),
        (lambda: P.dense(4, 8).heads(2, 2), "0 <= start < stop <= 4 .*got 2 and 2"),
        (lambda: P.dense(4, 8).heads(2, 5), "0 <= start < stop <= 4 .*got 2 and 5"),
        (lambda: P.dense(4, 8).mask(9, 8), "`query_len` must be at most `key_len`.*got 9 and 8"),
        (lambda: P.dense(4, 8).pairs(-1), "`seq_len` must not be negative, got -1"),
        (lambda: P.dense(2, 2**31), "`span` must be at most 2147483647, got 2147483648"),
        (lambda: P((((0, 2),),), 2**40), "`span` must be at most 2147483647, got 1099511627776"),
        (lambda: P.dense(2, 10**30), "`span` must fit in 64 bits, got an integer of 101 bits"),
        (lambda: P.exclusive(2, 10**9000, widths="geometric"), "`span` must fit in 64 bits"),
        (lambda: P((((0, 10**400),),), 8), "`intervals` must fit in 64 bits"),
        (lambda: P.dense(10**9, 8), "`num_heads` must be at most 1048576, got 1000000000"),
        (lambda: P(((),) * 1048577, 8), "`intervals` must hold at most 1048576 heads, got 1048577"),
        (lambda: P.sliding_window(2, 8, 2**70), "`window` must fit in 64 bits"),
        (lambda: P.dense(2, 8).mask(2, 2, query_start=2**40), "`query_start` must be at most"),
        (lambda: P.dense(2, 8).mask(2**62), "`mask` must have at most 2147483647 queries and keys"),
        (lambda: P.dense(2, 8).mask(0, 2**31), r"`mask` must have .* got 2 x 0 x 2147483648"),
        (lambda: P.dense(2, 8).mask(2**20), r"and 68719476736 elements, got 2 x 1048576 x 1048576"),
        (lambda: P.dense(2, float("inf")), "`span` must be an integer, got inf"),
        (lambda: P.dense(2, None), "`span` must be an integer, got None"),
        (lambda: P.from_dict({"version": True, "span": 4, "intervals": [[[0, 4]]]}), "got True"),
        (lambda: P.from_dict({"version": 1.0, "span": 4, "intervals": [[[0, 4]]]}), "got 1.0"),
        (lambda: P.from_dict({"version": 1, "span": 2**31, "intervals": [[]]}), "`span` must be"),
        (lambda: P.from_dict({"version": 3}), r"`version` must be one of \(1, 2\) .*got 3"),
        (lambda: P.from_dict({"version": 2}), r"lacks \['span', 'intervals', 'prefix'\]"),
        (lambda: P.from_dict(V2), r"lacks \['prefix'\]"),
        (lambda: P.from_dict(V2 | {"prefix": 5}), "`prefix` must be between 0 .* = 4, got 5"),
        (lambda: P.from_dict(V2 | {"prefix": None}), "`prefix` must be an integer, got None"),
        (
            lambda: P.from_dict(V2 | {"version": 1, "prefix": 0}),
            "a pattern of `version` 1 must have no `prefix`, got 0",
        ),
        (lambda: P.dense(2, 8, prefix=9), "`prefix` must be between 0 and `span` = 8, got 9"),
        (lambda: P.exclusive(2, 8, prefix=-1), "`prefix` must be between 0 and .*got -1"),
        (lambda: P.gapped(2, 8, prefix=True), "`prefix` must be an integer, got True"),
        (lambda: P.local_only(2, 8, prefix=1.0), r"`prefix` must be an integer, got 1\.0"),
        (lambda: P.shared_local(2, 8, prefix=None), "`prefix` must be an integer, got None"),
        (lambda: P.sliding_window(2, 8, 4, prefix="2"), "`prefix` must be an integer, got '2'"),
        (lambda: P((((0, 2),),), 8, prefix=10**30), "`prefix` must fit in 64 bits"),
        (lambda: P.from_dict({"version": 1, "span": 4}), r"lacks \['intervals'\]"),
        (lambda: P.from_dict({"version": 1, 1: 2}), r"lacks \['span', 'intervals'\]"),
        (lambda: P.from_dict([]), "must be a mapping, got list"),
    ],
)
def test_errors_name_argument_rule_and_value(make, message):
    """Errors name the argument the rule and the value."""
    with pytest.raises(ValueError, match=message):
        make()
