"""Pictures of masks: what a character or a colour stands for."""

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxsparse.attention import BlockMask, causal, draw, plot, s2, sliding_window


def test_draw_by_hand():
    mask = causal((7, 9), (2, 3))
    assert draw(mask).splitlines() == ["+..", "#+.", "#+.", "##+"]
    both = BlockMask.from_heads([mask, ~mask])
    assert draw(both).splitlines()[:2] == ["+..  +##", "#+.  .+#"]
    assert draw(both, max_heads=1) == draw(mask)
    two = BlockMask.from_dense(jnp.array([[[[True]]], [[[False]]]]), (2, 2))
    assert draw(two) == "#" and draw(two, batch=1) == "."


def test_draw_fits_a_width():
    mask = causal((40, 40), (2, 2))
    assert draw(mask, width=20) == draw(mask)
    lines = draw(mask, width=10).splitlines()  # 2 x 2 blocks a character
    assert len(lines) == 10
    for r, line in enumerate(lines):
        assert line == "#" * r + "+" + "." * (9 - r)
    assert max(map(len, draw(mask, width=7).splitlines())) == 7  # 20 blocks by threes
    four = s2((80, 80), (2, 2), heads=4, stride=4, local=1)
    assert max(map(len, draw(four, width=50).splitlines())) <= 50
    assert draw(mask, width=1) == "+"


def test_plot_shows_kinds():
    mask = sliding_window((40, 48), (8, 8), left=15)
    figure = plot(mask)
    (panel,) = figure.axes
    image = panel.images[0].get_array()
    assert image.shape == (5, 6)
    kinds = np.asarray(mask.kinds)[0, 0]
    np.testing.assert_array_equal(image == 0, kinds == -1)
    np.testing.assert_array_equal(image == 2, kinds == 0)
    assert panel.get_xlim() == (0, 48) and panel.get_ylim() == (40, 0)
    FigureCanvasAgg(figure).draw()  # it renders, without a warning


def test_plot_has_a_panel_a_head():
    mask = s2((64, 64), (8, 8), heads=6, stride=3, local=1)
    figure = plot(mask, max_heads=5)
    shown = [panel.get_title() for panel in figure.axes if panel.get_visible()]
    assert shown == [f"head {h}" for h in range(5)]
    FigureCanvasAgg(figure).draw()
    mine = Figure()
    axes = mine.subplots(1, 2)
    assert plot(mask, max_heads=2, axes=axes) is mine
    assert all(panel.images for panel in axes)


def test_bad_input():
    mask = causal((8, 8), (2, 2))
    for build, message in (
        (lambda: draw(mask, batch=1), "batch must be 0 to 0"),
        (lambda: draw(mask, max_heads=0), "max_heads must be at least 1"),
        (lambda: draw(mask, width=0), "width must be at least 1"),
        (lambda: plot(BlockMask.from_heads([mask] * 2), axes=Figure().subplots()), "2 heads need"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
