"""Fitted patterns: their budget, what they capture, and the sliding window that they beat."""

import sys
from dataclasses import replace
from fractions import Fraction
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

import spattention as spa
from spattention.fitting import captured, explain, sliding_window
from spattention.fitting.bins import causal_pairs, distance_edges

sys.path.insert(0, str(Path(__file__).parent))
from attending import profile_of, random_weights

P = spa.BandPattern
LAYERS, HEADS = 3, 4
fitting = import_module("spattention.fitting.fit")


def made(length=50, seed=0, sharp=1.0, needles=False, **more):
    generator = torch.Generator().manual_seed(seed)
    if needles:
        share = torch.rand(LAYERS, HEADS, generator=generator, dtype=torch.float64) ** 3
        more |= {"needle": share, "needles": 4}
    return profile_of(random_weights(LAYERS, HEADS, length, seed, sharp), **more)


def dense_pairs(length, layers=LAYERS):
    return layers * HEADS * length * (length + 1) // 2


def fetching_profile(share):
    """Heads that look at themselves alone, but for those that fetch, which look everywhere."""
    near = torch.eye(50, dtype=torch.float64).expand(LAYERS, HEADS, 50, 50)
    even = torch.ones(50, 50, dtype=torch.float64).tril()
    even = even / even.sum(-1, keepdim=True)
    weights = torch.where((share > 0)[..., None, None], even, near)
    return profile_of(weights, needle=share, needles=4)


def total_pairs(patterns, length):
    return sum(sum(pattern.pairs(length)) for pattern in patterns)


cases = st.tuples(
    st.sampled_from([1, 2, 17, 50, 64, 75, 130]),
    st.integers(0, 10**6),
    st.floats(0.0, 4.0),
    st.booleans(),
    st.sampled_from([None, 2]),
    st.floats(0.05, 1.0),
)


@given(cases)
@settings(max_examples=25, deadline=None)
def test_budget_is_kept_and_no_window_captures_more(case):
    length, seed, sharp, needles, kv_heads, pairs = case
    profile = made(length, seed, sharp, needles)
    least = Fraction(length, length * (length + 1) // 2)
    pairs = min(1.0, max(pairs, float(least) + 1e-9))
    patterns = spa.fit(profile, pairs=pairs, kv_heads=kv_heads)
    used = total_pairs(patterns, length)
    assert used <= pairs * dense_pairs(length)
    window = max(
        w for w in range(1, length + 1)
        if LAYERS * sum(P.sliding_window(HEADS, length, w).pairs(length))
        <= Fraction(pairs) * dense_pairs(length)
    )  # fmt: skip
    same = [P.sliding_window(HEADS, length, window)] * LAYERS
    assert captured(profile, patterns).mean() >= captured(profile, same).mean() - 1e-9
    assert sliding_window(profile, pairs=pairs) == same
    assert spa.fit(profile, pairs=pairs, kv_heads=kv_heads) == patterns
    for pattern in patterns:
        assert (pattern.num_heads, pattern.span) == (HEADS, length)
        assert all(head and head[0][0] == 0 for head in pattern.intervals)
        if kv_heads:
            assert pattern.intervals[::2] == pattern.intervals[1::2]


@given(st.sampled_from([33, 64, 90]), st.integers(0, 10**6), st.sampled_from([None, 2]))
@settings(max_examples=4, deadline=None)
def test_a_larger_budget_never_captures_less(length, seed, kv_heads):
    profile = made(length, seed)
    before = 0.0
    for percent in range(6, 101, 9):
        patterns = spa.fit(profile, pairs=percent / 100, kv_heads=kv_heads)
        now = float(captured(profile, patterns).mean())
        assert now >= before - 1e-12
        before = now
    assert spa.fit(profile, pairs=1) == [P.dense(HEADS, length)] * LAYERS


@given(st.integers(1, 63), st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_captured_is_the_weight_on_attended_keys(length, seed):
    weights = random_weights(LAYERS, HEADS, length, seed, 1.0)
    patterns = [
        P.shared_local(HEADS, length),
        P.exclusive(HEADS, length, widths="geometric"),
        P(intervals=((), ((0, 1),), ((0, length),), ((length - 1, length),)), span=length),
    ]
    masks = torch.stack([pattern.mask(length) for pattern in patterns])
    expected = (weights * masks).sum((-1, -2)) / length
    found = captured(profile_of(weights), patterns)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prefix", [0, 1, 4])
@pytest.mark.parametrize(("length", "local"), [(50, None), (50, 7), (5, None), (4, 4), (1, None)])
def test_a_prefix_counts_once_in_pairs_and_capture(prefix, length, local):
    """Against masks: keys of the prefix joined with the bands, as patterns with one define it."""
    if prefix > length:
        return
    weights = random_weights(LAYERS, HEADS, length, 3, 1.0)
    task = fitting._task(
        profile_of(weights), pairs=1.0 if length < 9 else 0.4, prefix=prefix, local=local
    )
    choice = task.allocate([], task.values) if length > 5 else task.window()
    distance = torch.arange(length)[:, None] - torch.arange(length)
    early = (torch.arange(length) < prefix) & (distance >= 0)
    pairs = share = 0
    for unit, head in enumerate(choice):
        inside = sum(((distance >= near) & (distance < far) for near, far in head)) > 0
        mask = inside | early
        pairs += int(mask.sum())
        assert (int(mask.sum()),) == P((head,), length, prefix=prefix).pairs(length)
        share += float((weights.flatten(0, 1)[unit] * mask).sum()) / length
    assert pairs <= task.budget
    first = float(task.profile.first[..., :prefix].sum())
    assert task.value(choice) + first == pytest.approx(share, abs=1e-9)


def test_a_prefix_goes_to_the_patterns():
    """Pairs, captured attention and the table are those of the masks with the prefix."""
    weights = random_weights(LAYERS, HEADS, 50, 3, 1.0)
    profile = profile_of(weights)
    patterns = spa.fit(profile, pairs=0.5, prefix=2)
    assert all(pattern.prefix == 2 for pattern in patterns)
    pairs = sum(sum(p.pairs(50)) for p in patterns)
    assert pairs <= 0.5 * dense_pairs(50)
    masks = torch.stack([pattern.mask(50) for pattern in patterns])
    expected = (weights * masks).sum((-1, -2)) / 50
    torch.testing.assert_close(captured(profile, patterns), expected, rtol=0, atol=1e-2)
    assert explain(profile, patterns).prefix == 2


def test_bands_go_where_heads_look():
    """A head that looks at one distance gets it, whatever the others look at."""
    length = 60
    weights = torch.zeros(1, 2, length, length, dtype=torch.float64)
    for query in range(length):
        weights[0, 0, query, query] = 1.0
        weights[0, 1, query, max(0, query - 30)] = 1.0
    profile = profile_of(weights, prefix_max=1)
    (pattern,) = spa.fit(profile, pairs=0.08, local=2)
    assert pattern.intervals[0] == ((0, 2),)
    assert (30, 31) in pattern.intervals[1]


def test_heads_that_fetch_attend_everything():
    share = torch.zeros(LAYERS, HEADS, dtype=torch.float64)
    share[1, 2], share[2, 0], share[0, 3] = 0.9, 0.3, 0.09
    profile = fetching_profile(share)
    patterns = spa.fit(profile, pairs=0.22, local=1)
    assert patterns[1].intervals[2] == patterns[2].intervals[0] == ((0, 50),)
    assert patterns[0].intervals[3] != ((0, 50),)
    shared = spa.fit(profile, pairs=0.4, kv_heads=2, local=1)
    assert shared[1].intervals[2:] == shared[2].intervals[:2] == (((0, 50),),) * 2


def answering_profile():
    """The loss minds each distance of two heads alike; answers mind a third, and a fourth less."""
    share = torch.zeros(LAYERS, HEADS, dtype=torch.float64)
    share[0, 3], share[1, 2] = 0.06, 0.9
    minded = torch.zeros_like(share)
    minded[0, 3], minded[1, 1] = 0.95, 0.05
    profile = fetching_profile(share)
    loss = torch.full_like(profile.distance, 1e-3)
    loss[2, :2] = 1.0
    return replace(profile, needle_sensitivity=minded, sensitivity=loss, sensitivity_rows=1)


def test_heads_that_answers_mind_attend_far():
    """A head may look little at a needle and matter most; a large share alone does not count."""
    profile = answering_profile()
    patterns = spa.fit(profile, pairs=0.35, local=1)
    assert patterns[0].intervals[3] == ((0, 50),)
    assert patterns[1].intervals[2] != ((0, 50),), "the answers do not mind it"
    without = replace(profile, needle_sensitivity=None)
    assert spa.fit(without, pairs=0.35, local=1)[1].intervals[2] == ((0, 50),)


def test_retrieval_weighs_answers_beside_the_loss():
    """0 leaves them out and 1 counts them alone; more weight never keeps less of them."""
    profile = answering_profile()

    def kept(retrieval):
        task = fitting._task(profile, pairs=0.25, local=1, retrieval=retrieval)
        patterns = task.patterns(task.allocate([], task.minded))
        pairs = torch.tensor([pattern.pairs(50) for pattern in patterns]) / (50 * 51 / 2)
        return float((pairs * profile.needle_sensitivity).sum()), float(pairs[2, :2].sum())

    answers, loss = zip(*(kept(weight) for weight in (0.0, 0.1, 0.5, 1.0)))
    assert list(answers) == sorted(answers)
    assert list(loss) == sorted(loss, reverse=True)
    assert answers[0] < 0.2 < 0.4 < answers[1]
    assert loss[0] == 2
    assert answers[-1] == pytest.approx(1)
    without = replace(profile, needle_sensitivity=None, needle=None, needles=0)
    assert spa.fit(profile, pairs=0.2, retrieval=0) == spa.fit(without, pairs=0.2)


def test_a_needle_is_as_likely_at_each_distance():
    """A head of half a budget attends the far half: fewer queries have it, and as many needles."""
    length = 64
    even = torch.ones(length, length, dtype=torch.float64).tril()
    weights = (even / even.sum(-1, keepdim=True)).expand(1, 2, length, length)
    minded = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    profile = profile_of(weights, needle=minded, needles=1, needle_sensitivity=minded)
    task = fitting._task(profile, pairs=0.25, local=1, retrieval=1.0)
    head = task.allocate([], task.minded)[0]
    assert head[0] == (0, 1)
    assert head[1][1] == length
    assert (length - head[1][0]) / length > 0.5, "more than half of the needles for half the pairs"


def test_fetching_gives_way_to_what_a_window_captures():
    """Heads that fetch and look near otherwise are dense only as far as the budget allows it."""
    share = torch.ones(LAYERS, HEADS, dtype=torch.float64)
    profile = made(50, sharp=3.0, needle=share, needles=4)
    for pairs in (0.05, 0.1, 0.3, 0.6):
        patterns = spa.fit(profile, pairs=pairs)
        window = sliding_window(profile, pairs=pairs)
        assert captured(profile, patterns).mean() >= captured(profile, window).mean()


def test_whole_layers_stay_dense():
    profile = made(50)
    for make in (spa.fit, sliding_window):
        patterns = make(profile, pairs=0.7, dense_layers=[2, 0])
        assert patterns[0] == patterns[2] == P.dense(HEADS, 50)
        assert patterns[1] != P.dense(HEADS, 50)
        assert total_pairs(patterns, 50) <= 0.7 * dense_pairs(50)
    window = sliding_window(profile, pairs=0.75, dense_layers=[0, 2])[1].intervals
    assert len(set(window)) == 1


def test_a_span_beyond_the_length():
    """A span beyond the length opens what ends with it."""
    profile = made(50)
    patterns = spa.fit(profile, pairs=0.4, span=200)
    short = spa.fit(profile, pairs=0.4)
    ends = {far for pattern in patterns for head in pattern.intervals for _, far in head}
    assert 200 in ends
    assert not any(50 <= far < 200 for far in ends)
    for pattern, other in zip(patterns, short):
        assert pattern.span == 200
        assert pattern.pairs(50) == other.pairs(50)


def test_pairs_are_counted_at_a_shorter_length():
    profile = made(75)
    patterns = spa.fit(profile, pairs=0.3, length=40, span=75)
    assert total_pairs(patterns, 40) <= 0.3 * dense_pairs(40)
    assert total_pairs(patterns, 40) > 0.28 * dense_pairs(40)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 0}, "`pairs` must be a number above 0 and at most 1, got 0"),
        ({"pairs": 1.01}, r"`pairs` must be .*got 1\.01"),
        ({"pairs": float("nan")}, "`pairs` must be .*got nan"),
        ({"pairs": "0.3"}, r"`pairs` must be a number .*got '0\.3'"),
        (
            {"pairs": 0.01},
            r"`pairs` must be at least 0\.0393 at length 50 for the nearest token in every head, "
            r"got 0\.01",
        ),
        (
            {"dense_layers": [0, 1]},
            r"at least 0\.6798 at length 50 for 2 of 3 layers dense, the nearest token in every "
            "other head, got 0.3",
        ),
        ({"local": 30, "prefix": 4}, "for the first 4 tokens and the nearest 30 tokens in every"),
        ({"local": 30}, r"at least 0\.8353 at length 50 for the nearest 30 tokens in every head"),
        ({"local": 0}, r"`local` must be at least 1 and at most 50 \(`length`\), got 0"),
        ({"local": 51}, "`local` must be .*got 51"),
        ({"length": 51}, r"`length` must be .*at most 50 \(the profile's longest row\), got 51"),
        ({"length": 0}, "`length` must be at least 1 .*got 0"),
        ({"length": 20.0}, r"`length` must be an integer, got 20\.0"),
        ({"span": 49}, r"`span` must be at least 50 \(`length`\), got 49"),
        (
            {"prefix": -1},
            r"`prefix` must be at least 0 and at most 4 \(what was measured\), got -1",
        ),
        ({"prefix": 5}, "`prefix` must be .*got 5"),
        ({"kv_heads": 4}, "`kv_heads` must be None or the model's 2 key/value heads, got 4"),
        ({"kv_heads": True}, "`kv_heads` must be .*got True"),
        ({"retrieval": 1.1}, r"`retrieval` must be a number from 0 to 1, got 1\.1"),
        ({"retrieval": float("nan")}, "`retrieval` must be a number from 0 to 1, got nan"),
        ({"retrieval": None}, "`retrieval` must be a number from 0 to 1, got None"),
        ({"dense_layers": [3]}, r"must be distinct indices from 0 to 2, got \[3\]"),
        ({"dense_layers": [1, 1]}, r"must be distinct indices from 0 to 2, got \[1, 1\]"),
        ({"dense_layers": 1}, "`dense_layers` must be indices of layers, got 1"),
    ],
)
def test_wrong_budgets_and_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        spa.fit(made(50), **{"pairs": 0.3} | options)


def test_a_budget_is_checked_without_a_profile():
    """What `fit` refuses is refused before anything is measured, with the same words."""
    profile = made(50)
    model, sizes = profile.model, (50, profile.prefix_max)
    for options in (
        {"pairs": 0.01},
        {"pairs": 0.3, "dense_layers": [0, 1]},
        {"pairs": 0.3, "span": 49},
        {"pairs": 0.3, "prefix": 5},
        {"pairs": 0.3, "kv_heads": 4},
        {"pairs": 0.3, "retrieval": 2},
    ):
        said = []
        for call in (
            lambda options=options: spa.fit(profile, **options),
            lambda options=options: fitting.check_budget(model, *sizes, **options),
        ):
            with pytest.raises(ValueError, match="`") as error:
                call()
            said.append(str(error.value))
        assert said[0] == said[1]
    fitting.check_budget(model, *sizes, pairs=0.3, prefix=4, kv_heads=2)


def test_what_is_no_profile_or_pattern_is_named():
    profile = made(50)
    dense = P.dense(HEADS, 50)
    with pytest.raises(ValueError, match="`profile` must be a Profile, got dict"):
        spa.fit({}, pairs=0.3)
    for patterns, message in (
        (dense, "`patterns` must be one per layer, 3, got BandPattern"),
        ([dense], "`patterns` must be one per layer, 3, got 1"),
        ([dense, None, dense], "`patterns` must hold BandPattern, got NoneType for layer 1"),
        ([P.dense(2, 50)] * 3, "`patterns` of layer 0 has 2 heads but the profile's model has 4"),
    ):
        with pytest.raises(ValueError, match=message):
            captured(profile, patterns)


def test_the_table_says_what_each_head_got_and_why():
    share = torch.zeros(LAYERS, HEADS, dtype=torch.float64)
    share[1, 2] = 0.9
    profile = fetching_profile(share)
    patterns = spa.fit(profile, pairs=0.6, dense_layers=[0])
    table = explain(profile, patterns)
    assert table.pairs == pytest.approx(total_pairs(patterns, 50) / dense_pairs(50))
    assert table.captured == pytest.approx(float(captured(profile, patterns).mean()))
    assert len(table.rows) == LAYERS * HEADS
    assert {row.reason for row in table.layer(0)} == {"whole layer"}
    assert table.layer(1)[2].reason == "fetches (0.90 on needles)"
    text = str(table)
    assert text.count("\n| 0 |") == text.count("\n| 1 |") == text.count("\n| 2 |") == 1
    assert "fetches (0.90 on needles)" in text
    assert f"{table.pairs:.4f} of dense attention's pairs at 50 tokens" in text


def test_the_table_says_what_answers_mind():
    """A head that looks little at needles and attends everything for them says so."""
    profile = answering_profile()
    table = explain(profile, spa.fit(profile, pairs=0.35, local=1))
    assert table.layer(0)[3].reason.startswith("fetches (0.95 of what answers mind)")


def test_the_command_weighs_needles_as_fit_does():
    """The options repeat the default, so that showing them imports no model code."""
    options = import_module("spattention.cli.options.fit").Options
    assert options.retrieval == fitting.RETRIEVAL


def test_the_table_says_how_much_the_loss_minds_a_head():
    plain = made(50)
    minded = torch.ones_like(plain.distance)
    minded[2, 1] *= 13
    table = explain(
        made(50, sensitivity=minded, sensitivity_rows=1), [P.sliding_window(HEADS, 50, 9)] * LAYERS
    )
    assert table.layer(2)[1].minded == pytest.approx(6.5)
    assert table.layer(0)[0].minded == pytest.approx(0.5)
    assert ", minded 6.5 x the mean" in str(table)
    assert explain(plain, [P.dense(HEADS, 50)] * LAYERS).rows[0].minded is None
    assert "minded" not in str(explain(plain, [P.dense(HEADS, 50)] * LAYERS))


def test_the_table_counts_what_a_cache_keeps():
    """Two query heads read one key/value head, which is kept as far as the farther one looks."""
    one = P(intervals=(((0, 2),), ((0, 1), (5, 10)), ((0, 4),), ((0, 3),)), span=50)
    table = explain(made(50), [one, P.dense(HEADS, 50), P.sliding_window(HEADS, 50, 25)])
    assert table.cache == pytest.approx((10 + 4 + 50 + 50 + 25 + 25) / (6 * 50))


def test_one_layer_of_a_picture_has_one_tick():
    """Layers are whole numbers on the axis, one layer too."""
    picture = import_module("spattention.fitting.picture")
    figure = Figure()
    axis = figure.subplots()
    picture._heads(axis, torch.rand(1, 4), "share", "share", Normalize(0, 1))
    assert [tick for tick in axis.get_yticks() if -0.5 <= tick <= 0.5] == [0]


def test_the_picture_of_a_fit_shows_every_layer():
    """Layers have whole numbers, distances are tokens, and no title runs out of the picture."""
    profile = made(50)
    figure = import_module("spattention.fitting.picture").fit_figure(
        profile, spa.fit(profile, pairs=0.3, prefix=4)
    )
    figure.canvas.draw()
    reach = figure.axes[2]
    assert [label.get_text() for label in reach.get_yticklabels()] == ["0", "1", "2"]
    assert {"1", "4", "16"} <= {label.get_text() for label in reach.get_xticklabels()}
    right = max(axis.title.get_window_extent().x1 for axis in figure.axes)
    assert right <= figure.bbox.x1
    titles = " ".join(axis.get_title() for axis in figure.axes)
    for words in ("share of dense attention's pairs", "captured", "distances that each head"):
        assert words in titles


def test_bins_are_exact_up_to_64_then_8_per_doubling():
    edges = distance_edges(4096)
    assert edges[:65] == tuple(range(65))
    assert [edge for edge in edges if edge in (64, 128, 256, 512, 1024, 2048, 4096)] == [
        64, 128, 256, 512, 1024, 2048, 4096
    ]  # fmt: skip
    assert sum(64 <= edge < 128 for edge in edges) == 8
    assert sum(1024 <= edge < 2048 for edge in edges) == 8
    for length in (1, 2, 63, 64, 65, 70, 71, 1000, 4095):
        short = distance_edges(length)
        assert short[-1] == length
        assert short[:-1] == edges[: len(short) - 1]
    assert causal_pairs(2, 5, 9) == sum(9 - d for d in (2, 3, 4))
    assert causal_pairs(5, 2, 9) == 0


def test_the_budget_goes_where_the_loss_minds():
    """Two heads look at the same distance, and the budget suffices for one of them."""
    length = 60
    weights = torch.zeros(1, 2, length, length, dtype=torch.float64)
    for query in range(length):
        weights[0, :, query, query] += 0.5
        weights[0, :, query, max(0, query - 30)] += 0.5
    for matters in (0, 1):
        minded = profile_of(weights, prefix_max=1).distance.clone()
        minded[0, 1 - matters] *= 1e-3
        found = profile_of(weights, prefix_max=1, sensitivity=minded, sensitivity_rows=1)
        (pattern,) = spa.fit(found, pairs=0.045, local=1)
        assert (30, 31) in pattern.intervals[matters]
        assert (30, 31) not in pattern.intervals[1 - matters]
        window = sliding_window(found, pairs=0.045)
        assert captured(found, [pattern]).mean() > captured(found, window).mean()


@given(st.integers(0, 10**6), st.floats(0.05, 1.0), st.sampled_from([0, 2]))
@settings(max_examples=15, deadline=None)
def test_sensitivity_never_captures_less_than_a_window(seed, pairs, prefix):
    """Where it would, captured attention counts as well."""
    generator = torch.Generator().manual_seed(seed)
    plain = made(70, seed, 2.0, True)
    minded = torch.rand(plain.distance.shape, generator=generator, dtype=torch.float64) ** 8
    found = made(70, seed, 2.0, True, sensitivity=minded, sensitivity_rows=2)
    pairs = max(pairs, 0.05 + prefix / 35)
    answers = torch.rand(LAYERS, HEADS, generator=generator, dtype=torch.float64) ** 8
    asked = replace(found, needle_sensitivity=answers / answers.sum())
    window = sliding_window(found, pairs=pairs, prefix=prefix)
    for measured, retrieval in ((found, 0.1), (asked, 0.1), (asked, 1.0)):
        patterns = spa.fit(measured, pairs=pairs, prefix=prefix, retrieval=retrieval)
        assert captured(found, patterns).mean() >= captured(found, window).mean() - 1e-9
        assert total_pairs(patterns, 70) <= pairs * dense_pairs(70)
        assert spa.fit(measured, pairs=pairs, prefix=prefix, retrieval=retrieval) == patterns


def test_every_head_keeps_its_nearest_tokens():
    """By default 64, or half of the window that the budget allows."""
    for length, pairs in ((130, 0.9), (130, 0.3), (50, 0.1), (17, 0.2)):
        (window,) = {
            head for p in sliding_window(made(length), pairs=pairs) for head in p.intervals
        }
        least = max(1, min(64, window[0][1] // 2))
        for pattern in spa.fit(made(length), pairs=pairs):
            assert all(head[0][1] >= least for head in pattern.intervals)
