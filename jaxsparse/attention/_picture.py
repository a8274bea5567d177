"""Pictures of masks: characters for a terminal or a doctest, panels for matplotlib."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import numpy as np

from pallas_kernels._block_lists import FULL, NONE
from pallas_kernels._block_mask import BlockMask

FULL_MARK, PARTIAL_MARK, EMPTY_MARK = "#", "+", "."


def draw(mask: BlockMask, *, batch: int = 0, max_heads: int = 4, width: int = 96) -> str:
    """A mask as text, a character a block: `#` full, `+` partial, `.` empty.

    Args:
        mask: To draw; its values must be known (not under jit).
        batch: Which batch entry.
        max_heads: The first so many heads are drawn, side by side.
        width: Most characters of a line. If blocks need more, a character stands for n x n blocks:
            `#` if all are full, `.` if none is listed, else `+`.

    Raises:
        ValueError: If there is no such batch entry, or a number is below 1.

    Example:
        >>> from jaxsparse.attention import draw, sliding_window
        >>> print(draw(sliding_window((8, 8), (2, 2), left=2)))
        +...
        ++..
        .++.
        ..++

    Cost: reads the map of blocks from the device.
    """
    kinds = _kinds(mask, batch, max_heads)
    if width < 1:
        raise ValueError(f"width must be at least 1; got {width}.")
    room = max((width - 2 * (len(kinds) - 1)) // len(kinds), 1)
    step = -(-kinds.shape[2] // room)
    marks = [_marks(_coarse(head, step)) for head in kinds]
    return "\n".join("  ".join(line).rstrip() for line in zip(*marks, strict=True))


def plot(mask: BlockMask, *, batch: int = 0, max_heads: int = 8, axes: Any = None) -> Any:
    """A mask as a matplotlib figure, a panel a head: full blocks dark, partial ones light.

    Args:
        mask: To draw; its values must be known (not under jit).
        batch: Which batch entry.
        max_heads: The first so many heads are drawn.
        axes: Matplotlib axes to draw on, one for each head drawn; a new figure if not given.

    Returns:
        The figure. A new one belongs to no window: save it with `figure.savefig`, a notebook shows
        it as it is.

    Raises:
        ImportError: Without matplotlib.
        ValueError: If there is no such batch entry, or too few axes.

    Example:
        >>> from jaxsparse.attention import plot, sliding_window
        >>> figure = plot(sliding_window((512, 512), (64, 64), left=128))
        >>> len(figure.axes)
        1

    Cost: reads the map of blocks from the device.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    kinds = _kinds(mask, batch, max_heads)
    colours = {"empty": "#f4f4f4", "partial": "#8ab6d6", "full": "#1f4e79"}
    across = min(len(kinds), 4)
    if axes is None:
        down = -(-len(kinds) // across)
        size = max(2.6 * across + 0.4, 3.6), 2.8 * down + 0.8
        figure = Figure(figsize=size, layout="compressed")  # panels are square, mostly
        axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
        for spare in axes[len(kinds) :]:
            spare.set_visible(False)
        handles = [Patch(facecolor=c, edgecolor="#999999", label=n) for n, c in colours.items()]
        figure.legend(handles=handles, ncols=3, loc="outside lower center", frameon=False)
    axes = np.ravel(axes)
    if len(axes) < len(kinds):
        raise ValueError(f"{len(kinds)} heads need as many axes; got {len(axes)}.")
    (t, s), (rows, cols) = mask.shape, mask.grid
    for head, (panel, kind) in enumerate(zip(axes, kinds, strict=False)):
        state = np.where(kind == NONE, 0, np.where(kind == FULL, 2, 1))
        extent = (0, cols * mask.block_size[1], rows * mask.block_size[0], 0)
        colour_map = ListedColormap(list(colours.values()))
        options = {"vmin": 0, "vmax": 2, "interpolation": "nearest", "aspect": "equal"}
        panel.imshow(state, cmap=colour_map, extent=extent, **options)
        panel.set(xlim=(0, s), ylim=(t, 0), xlabel="key", ylabel="query")
        panel.tick_params(labelbottom=True)  # also above a place that stays empty
        if mask.heads > 1:
            panel.set_title(f"head {head}", fontsize="medium")
        if head % across:
            panel.set_ylabel("")
    return axes[0].figure


def _kinds(mask: BlockMask, batch: int, max_heads: int) -> np.ndarray:
    """The kinds [heads, R, C] of a batch entry."""
    kinds = np.asarray(jax.device_get(mask.kinds))
    if not 0 <= batch < len(kinds):
        raise ValueError(f"batch must be 0 to {len(kinds) - 1}; got {batch}.")
    if max_heads < 1:
        raise ValueError(f"max_heads must be at least 1; got {max_heads}.")
    return kinds[batch, :max_heads]


def _coarse(kinds: np.ndarray, step: int) -> np.ndarray:
    """2 (full), 1 (partial) or 0 (empty) of each `step` x `step` blocks; the rest is left out."""
    rows, cols = kinds.shape
    result = np.empty((-(-rows // step), -(-cols // step)), int)
    for r, c in itertools.product(*map(range, result.shape)):
        part = kinds[r * step : (r + 1) * step, c * step : (c + 1) * step]
        result[r, c] = 2 if (part == FULL).all() else 0 if (part == NONE).all() else 1
    return result


def _marks(states: np.ndarray) -> list[str]:
    """A line of characters a row."""
    return ["".join((EMPTY_MARK, PARTIAL_MARK, FULL_MARK)[x] for x in row) for row in states]
