"""A dense weight seen as tiles: its grid of blocks, the blocks at given places, block maps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def grid_of(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """(R, C) of a weight `[..., K, N]`; raises where blocks do not divide it."""
    if len(shape) < 2 or shape[-2] % block[0] or shape[-1] % block[1]:
        raise ValueError(
            f"blocks of {tuple(block)} do not divide a weight of shape {tuple(shape)}: its last "
            "two axes must be multiples of the block. Pad it, or choose another block."
        )
    return shape[-2] // block[0], shape[-1] // block[1]


def tiles_of(w: jax.Array, block: tuple[int, int]) -> tuple[tuple[int, int], jax.Array]:
    """The grid (R, C), and `[..., R, C, bk, bn]`."""
    r, c = grid_of(w.shape, block)
    tiles = w.reshape(*w.shape[:-2], r, block[0], c, block[1]).swapaxes(-3, -2)
    return (r, c), tiles


def take(tiles: jax.Array, rows: jax.Array, cols: jax.Array) -> jax.Array:
    """The tiles `[..., R, C, bk, bn]` at `[..., S]` places; zero where there is none."""

    def one(tiles: jax.Array, rows: jax.Array, cols: jax.Array) -> jax.Array:
        return tiles.at[rows, cols].get(mode="fill", fill_value=0)

    for _ in rows.shape[:-1]:
        one = jax.vmap(one)
    return one(tiles, rows, cols)


def block_map_of(
    tiles: jax.Array,
    shape: tuple[int, ...],
    block: tuple[int, int],
    grid: tuple[int, int],
    mask: Any,
) -> jax.Array:
    """Bool `[..., R, C]`: the blocks to store."""
    if mask is None:
        return jnp.any(tiles != 0, (-2, -1))
    mask = jnp.asarray(mask)
    lead = shape[:-2]
    if mask.dtype != jnp.bool_ or mask.shape not in ((*lead, *grid), shape):
        raise ValueError(
            f"mask must be bool, of the weight {shape} or a block map {(*lead, *grid)}; got "
            f"{mask.dtype} {mask.shape}."
        )
    if mask.shape == (*lead, *grid):
        return mask
    inside = tiles_of(mask, block)[1]
    some = jnp.any(inside, (-2, -1))
    differs = some != jnp.all(inside, (-2, -1))
    if not isinstance(differs, Tracer) and bool(jnp.any(differs)):
        *_, row, column = (int(i[0]) for i in np.nonzero(np.asarray(differs)))
        raise ValueError(
            f"the mask differs within the block at block row {row}, block column {column}, so the "
            f"block {tuple(block)} cannot be stored or left out whole. Make masks with "
            f"Block({tuple(block)}), or give a block map."
        )
    return some
