"""Pictures agree with what they show, pixel by pixel."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from spattention.bands import BandPattern
from spattention.plots import FUTURE, UNSEEN, head_colors, mask_image, pattern_figure

PATTERNS = [
    BandPattern.shared_local(4, 16),
    BandPattern.exclusive(3, 11, widths="geometric"),
    BandPattern((((0, 4), (8, 12)), ()), 12),
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


def test_the_cover_shows_each_interval_at_its_distances():
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


def test_a_long_mask_is_drawn_in_blocks_and_no_band_is_lost():
    pattern = BandPattern((((0, 3), (5000, 5001)),), 2**20)
    image = mask_image(pattern, 0, 2**20, cells=64)
    assert image.shape == (64, 64, 3)
    small = BandPattern((((0, 3), (50, 51)),), 100)
    mask = small.mask(100)[0].numpy().reshape(20, 5, 20, 5).any(axis=(1, 3))
    seen = (mask_image(small, 0, 100, cells=20) == head_colors(1)[0]).all(axis=-1)
    assert (seen == mask).all()


def test_the_colours_of_heads_differ():
    for heads in (2, 8, 32):
        assert len(set(head_colors(heads))) == heads
