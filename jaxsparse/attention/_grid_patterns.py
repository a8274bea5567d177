"""Neighbourhoods in images and videos, whose tokens stand block by block."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxsparse.attention._block_patterns import block_pattern
from jaxsparse.attention._window_patterns import Sizes
from pallas_kernels._block_mask import BlockMask


def blocked_order(grid: Sequence[int], tile: Sequence[int]) -> jax.Array:
    """The order of tokens in which the tokens of each tile of an image or video stand together.

    `x[:, order]` brings raster order into blocks; `x[:, jnp.argsort(order)]` takes it back.

    Args:
        grid: Tokens along each axis: (rows, columns), or (frames, rows, columns).
        tile: Tokens of a tile along each axis; their product is the block size of the mask.

    Returns:
        int32 `[tokens]`: raster index of each token, tiles in raster order, tokens too.

    Raises:
        ValueError: If tiles do not divide the grid.

    Example:
        >>> from jaxsparse.attention import blocked_order
        >>> blocked_order((2, 4), (2, 2))
        Array([0, 1, 4, 5, 2, 3, 6, 7], dtype=int32)

    Cost: one gather of the tokens.
    """
    if len(grid) != len(tile) or any(n % m for n, m in zip(grid, tile, strict=True)):
        raise ValueError(f"tile must divide grid on every axis; got {tile} and {grid}.")
    split = [size for n, m in zip(grid, tile, strict=True) for size in (n // m, m)]
    tokens = jnp.arange(math.prod(grid), dtype=jnp.int32).reshape(split)
    return tokens.transpose(*range(0, len(split), 2), *range(1, len(split), 2)).ravel()


def neighbourhood(
    shape: Sizes,
    block_size: Sizes,
    *,
    grid: Sequence[int],
    before: Sequence[int],
    after: Sequence[int] | None = None,
) -> BlockMask:
    """Each block sees the blocks around it, in two, three or any number of dimensions.

    Block p sees block p' where -before <= p' - p <= after on every axis. Blocks that have no
    neighbour on a side see fewer.

    Args:
        shape: (T, S), T = S; tokens in the order of `blocked_order`.
        block_size: (bq, bkv), tokens; bkv is one block of the grid.
        grid: Blocks along each axis, in raster order.
        before: Blocks seen on the lower side, for each axis.
        after: Those on the upper side; as many if not given. 0 on the first axis of a video is
            causal in time.

    Raises:
        ValueError: If the grid does not have S / bkv blocks, or axes do not fit.

    Example:
        >>> from jaxsparse.attention import draw, neighbourhood
        >>> print(draw(neighbourhood((12, 12), (2, 2), grid=(2, 3), before=(0, 1))))
        ##....
        ###...
        .##...
        ...##.
        ...###
        ....##

    Cost: the product of (before + after + 1) blocks a block of queries.

    References: Yang et al., Inf-DiT: Upsampling Any-Resolution Image with Memory-Efficient
    Diffusion Transformer, 2024, arXiv:2405.04312.
    """
    after = before if after is None else after
    axes = len(grid)
    if (len(before), len(after)) != (axes, axes) or min(*before, *after) < 0:
        raise ValueError(
            f"before and after need a number, 0 or more, for each of the {axes} axes of the grid; "
            f"got {tuple(before)} and {tuple(after)}."
        )
    blocks = -(-shape[1] // block_size[1])
    if shape[0] != shape[1] or math.prod(grid) != blocks:
        raise ValueError(
            f"a grid of {tuple(grid)} needs T = S of {math.prod(grid)} blocks; got shape={shape}, "
            f"{blocks} blocks of keys."
        )

    def sees(i: jax.Array, j: jax.Array) -> jax.Array:
        near = jnp.ones((), bool)
        for size, low, high in zip(grid[::-1], before[::-1], after[::-1], strict=True):
            step = j % size - i % size
            near = near & (step >= -low) & (step <= high)
            i, j = i // size, j // size
        return near

    return block_pattern(sees, shape, block_size)


def uniba(shape: Sizes, block_size: Sizes, *, grid: Sizes) -> BlockMask:
    """Unidirectional block attention: each block sees itself, its left, top and top-left block.

    So an image can be made row by row of blocks, and the keys of finished rows forgotten.

    Args:
        shape: (T, S), T = S; tokens in the order of `blocked_order`.
        block_size: (bq, bkv), tokens; bkv is one block of the image.
        grid: Rows and columns of blocks.

    Raises:
        ValueError: If the grid does not have S / bkv blocks.

    Example:
        >>> from jaxsparse.attention import draw, uniba
        >>> print(draw(uniba((12, 12), (2, 2), grid=(2, 3))))
        #.....
        ##....
        .##...
        #..#..
        ##.##.
        .##.##

    Cost: 4 blocks a block of queries. After d layers a block depends on those up to d rows above
    and d columns to the left.

    Deviations: none known; the three neighbours are from a summary of the paper, not checked in it.
    Tokens inside a block all see each other.

    References: Yang et al., Inf-DiT: Upsampling Any-Resolution Image with Memory-Efficient
    Diffusion Transformer, 2024, arXiv:2405.04312.
    """
    return neighbourhood(shape, block_size, grid=grid, before=(1, 1), after=(0, 0))
