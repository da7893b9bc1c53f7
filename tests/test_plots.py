"""Pictures agree with what they show, pixel by pixel."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from spattention.bands import BandPattern
from spattention.choice import named_pattern, pattern_remarks
from spattention.evaluation.heads import LayerHeads
from spattention.evaluation.perplexity import LossByPosition, Mean
from spattention.plots import (
    FUTURE,
    UNSEEN,
    evaluation_figure,
    head_colors,
    mask_image,
    pattern_figure,
    seen_figure,
    seen_image,
)

PATTERNS = [
    BandPattern.shared_local(4, 16),
    BandPattern.exclusive(3, 11, widths="geometric"),
    BandPattern((((0, 4), (8, 12)), ()), 12),
    BandPattern((((3, 5),), ()), 12, prefix=2),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_the_rendered_pixels_are_those_of_the_mask(pattern):
    figure = pattern_figure(pattern)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3] / 255
    masks = pattern.mask(pattern.span).numpy()
    colors = head_colors(pattern.num_heads)
    axes = [axis for axis in figure.axes if axis.images]
    assert len(axes) == pattern.num_heads
    for head, axis in enumerate(axes):
        for query in range(pattern.span):
            for key in range(pattern.span):
                x, y = axis.transData.transform((key + 0.5, query + 0.5))
                expected = colors[head] if masks[head, query, key] else UNSEEN
                if key > query:
                    expected = FUTURE
                assert pixels[len(pixels) - 1 - int(y), int(x)] == pytest.approx(expected, abs=0.01)


def test_the_cover_shows_each_interval():
    """The cover shows each interval at its distances."""
    pattern = BandPattern.shared_local(8, 1024)
    cover = pattern_figure(pattern).axes[-1]
    bars = sorted((round(b.get_y() + 0.4), b.get_x(), b.get_width()) for b in cover.patches)
    expected = [
        (head, near, far - near)
        for head, bands in enumerate(pattern.intervals)
        for near, far in bands
    ]
    assert bars == expected


def test_images_at_full_size_and_shorter():
    pattern = BandPattern.exclusive(8, 1024)
    image = mask_image(pattern, 7, 1024)
    assert image.shape == (1024, 1024, 3)
    seen = (image == head_colors(8)[7]).all(axis=-1)
    assert seen.sum() == pattern.pairs(1024)[7]
    assert mask_image(pattern, 0, 5).shape == (5, 5, 3)
    with pytest.raises(ValueError, match="`length` must be at least 1, got 0"):
        pattern_figure(pattern, 0)


def test_a_long_mask_loses_no_band():
    """A long mask is drawn in blocks and no band is lost."""
    pattern = BandPattern((((0, 3), (5000, 5001)),), 2**20)
    image = mask_image(pattern, 0, 2**20, cells=64)
    assert image.shape == (64, 64, 3)
    small = BandPattern((((0, 3), (50, 51)),), 100, prefix=6)
    mask = small.mask(100)[0].numpy().reshape(20, 5, 20, 5).any(axis=(1, 3))
    seen = (mask_image(small, 0, 100, cells=20) == head_colors(1)[0]).all(axis=-1)
    assert (seen == mask).all()


def test_the_colours_of_heads_differ():
    for heads in (2, 8, 32):
        assert len(set(head_colors(heads))) == heads


@pytest.mark.parametrize(("heads", "span"), [(8, 1024), (32, 32_768), (16, 131_072)])
def test_titles_of_heads_do_not_overlap(heads, span):
    figure = pattern_figure(BandPattern.shared_local(heads, span, prefix=4))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [axis.title.get_window_extent(canvas.get_renderer()) for axis in figure.axes[:-1]]
    width, height = canvas.get_width_height()
    for number, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height
        assert not any(box.overlaps(other) for other in boxes[:number])


def test_titles_of_heads_name_the_prefix():
    figure = pattern_figure(BandPattern((((0, 4),), ()), 16, prefix=2))
    titles = [axis.get_title() for axis in figure.axes[:2]]
    assert titles[0].startswith("head 0: first 2 [0, 4)")
    assert titles[1].startswith("head 1: no keys")


def test_the_title_names_the_share_of_all_heads():
    pattern = BandPattern.exclusive(4, 64)
    share = sum(pattern.pairs(64)) / (4 * 64 * 65 / 2)
    figure = pattern_figure(pattern, title="four heads")
    title = figure.subfigs[0].get_suptitle()
    assert title == f"four heads: {100 * share:.1f} % of dense attention's pairs"


@pytest.mark.parametrize(
    ("name", "heads", "span", "remark"),
    [
        ("shared_local:local=5000", 8, 1024, "attends all distances: this is dense attention"),
        ("shared_local:widths=geometric", 8, 128, "this is dense attention"),
        ("shared_local:widths=geometric", 8, 256, "7 of 8 heads of shared_local attend the same"),
        ("exclusive", 8, 5, "3 of 8 heads of exclusive attend nothing"),
        ("gapped", 8, 8, "8 of 8 heads of gapped attend nothing"),
        ("sliding_window", 8, 1024, None),
        ("dense", 8, 1024, None),
        ("local_only", 8, 1024, None),
        ("shared_local", 8, 1024, None),
        ("exclusive:widths=geometric", 8, 1024, None),
        ("exclusive:widths=geometric,kv_heads=4", 8, 1024, None),
        ("shared_local:widths=geometric,kv_heads=4", 8, 256, "6 of 8 heads of shared_local"),
    ],
)
def test_patterns_that_are_hardly_meant_get_a_remark(name, heads, span, remark):
    found = pattern_remarks(named_pattern(name, heads, span))
    assert len(found) == (remark is not None)
    assert all(remark in text for text in found)


def test_the_evaluation_names_model_and_shading():
    loss = LossByPosition(Mean(2.0, 0.1, 3), (1, 2, 4), (Mean(2.5, 0.2, 3), Mean(1.9, 0.1, 3)), 4)
    figure = evaluation_figure(loss, None, None, "Evaluation of runs/a/checkpoint-200")
    assert figure.get_suptitle() == "Evaluation of runs/a/checkpoint-200"
    (axis,) = figure.axes
    assert [t.get_text() for t in axis.get_legend().get_texts()] == [
        "± one standard error, over windows"
    ]


def test_one_layer_has_one_tick():
    """Layers are whole numbers on the axis, one layer too."""
    figure = evaluation_figure(None, None, [LayerHeads((1.0, 2.0), (3.0, 4.0), 0.5)], "")
    axis = figure.axes[0]
    shown = [tick for tick in axis.get_yticks() if -0.5 <= tick <= 0.5]
    assert shown == [0]


def test_what_a_method_sees_is_drawn_pair_by_pair():
    """A pair seen through a group is paler, and a block of pairs shows the strongest of them."""
    seen = np.zeros((2, 6, 6), dtype=np.uint8)
    seen[1] = np.tril(np.ones((6, 6)))
    seen[1, 5, 0] = 2
    image = seen_image(seen, 1)
    color = np.array(head_colors(2)[1])
    assert image[4, 0] == pytest.approx(color)
    assert image[5, 0] == pytest.approx((color + 2) / 3)
    assert image[0, 5] == pytest.approx(FUTURE)
    assert seen_image(seen, 0)[5, 0] == pytest.approx(UNSEEN)
    assert seen_image(seen, 1, cells=3).shape == (3, 3, 3)
    assert seen_image(seen, 1, cells=3)[2, 0] == pytest.approx((color + 2) / 3)
    title = seen_figure(seen, "cca").get_suptitle()
    assert title == "cca: reaches 50.0 % of dense attention's pairs"
