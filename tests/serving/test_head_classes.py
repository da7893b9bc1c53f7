"""Classes of key/value heads: no band outlives its window, and all layers and ranks agree."""

from __future__ import annotations

from dataclasses import replace

import pytest

import spattention as spa
from spattention.serving.head_classes import (
    MAX_CLASSES,
    described,
    head_classes,
    kv_reaches,
    rank_pattern,
)

P = spa.BandPattern
SPAN = 8192
LAYERS = [
    P.shared_local(32, SPAN, widths="geometric"),
    P.exclusive(32, SPAN),
    P.shared_local(32, SPAN, widths="equal_work", local=512),
    P(((),) * 31 + (((0, 5),),), SPAN),
]


@pytest.mark.parametrize("uniform_pages", [False, True])
@pytest.mark.parametrize(("kv_heads", "ranks"), [(8, 1), (8, 2), (8, 16), (32, 4), (1, 1), (6, 1)])
def test_no_band_outlives_its_window(kv_heads: int, ranks: int, uniform_pages: bool) -> None:
    """Each head is in one class whose window holds its farthest edge; sizes and windows are the
    same for every layer and rank, and each size divides the pages that classes share."""
    layers = [P.shared_local(24, SPAN, widths="geometric")] if kv_heads == 6 else LAYERS
    here = max(1, kv_heads // ranks)
    forms = set()
    for rank in range(ranks):
        found = head_classes(layers, kv_heads, ranks=ranks, rank=rank, uniform_pages=uniform_pages)
        assert len(found) == len(layers)
        for pattern, classes in zip(layers, found):
            forms.add(tuple((len(part.kv_heads), part.window) for part in classes))
            heads = [head for part in classes for head in part.kv_heads]
            assert sorted(heads) == list(range(here))
            edges = kv_reaches(rank_pattern(pattern, ranks, rank), here)
            assert all(edges[head] <= part.window for part in classes for head in part.kv_heads)
    (form,) = forms
    assert len(form) <= MAX_CLASSES
    page = here if uniform_pages else max(size for size, _ in form)
    assert all(page % size == 0 for size, _ in form)


def test_geometric_bands_free_most_keys() -> None:
    """A geometric pattern of eight key/value heads keeps far fewer keys than one window would."""
    pattern = P.shared_local(8, SPAN, widths="geometric")
    (classes,) = head_classes([pattern], 8)
    kept = sum(len(part.kv_heads) * part.window for part in classes)
    assert kept < 0.3 * 8 * SPAN
    (one,) = head_classes([pattern], 8, max_classes=1)
    assert [(part.kv_heads, part.window) for part in one] == [(tuple(range(8)), SPAN)]


def test_equal_bands_stay_in_one_class() -> None:
    """Heads that reach equally far are not split."""
    (classes,) = head_classes([P.sliding_window(16, SPAN, 100)], 4)
    assert [(part.kv_heads, part.window) for part in classes] == [((0, 1, 2, 3), 100)]


def test_far_heads_come_last_whatever_their_index() -> None:
    """Classes go by the bands, not by the order of the heads."""
    pattern = P((((0, 90),), ((0, 2),), ((0, 50),), ((0, 3),)), 100)
    (classes,) = head_classes([pattern], 4)
    assert [part.kv_heads for part in classes] == [(1,), (3,), (2,), (0,)]
    assert [part.window for part in classes] == [2, 3, 50, 90]


def test_a_prefix_does_not_lengthen_windows() -> None:
    """Its blocks are kept besides those of the windows."""
    pattern = P.shared_local(8, 4096, widths="geometric")
    assert head_classes([replace(pattern, prefix=4)], 8) == head_classes([pattern], 8)


def test_the_log_names_pattern_classes_and_edge() -> None:
    layer = P.shared_local(32, SPAN, widths="geometric", prefix=4)
    line = described([layer] * 3, head_classes([layer] * 3, 8)[0], 4)
    assert line == (
        "bands in 3 of 4 layers: BandPattern.shared_local(num_heads=32, span=8192, "
        "widths='geometric', prefix=4), farthest edge 8,192 tokens; key/value heads of a rank "
        "by how far back they read: 4 up to 670, 2 up to 2,342, 1 up to 4,380, 1 up to 8,192 "
        "tokens, and all the first 4"
    )
    others = described(LAYERS, head_classes(LAYERS, 8)[0], 4)
    assert "bands in 4 of 4 layers: 4 different patterns, farthest edge 8,192 tokens; " in others
    assert others.endswith(" tokens")
