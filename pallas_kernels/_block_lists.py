"""Lists of blocks: for each block of one side, the blocks of the other side that it meets."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

NONE = -1  # kind of a block that is not listed
FULL = 0  # of one without a rule; kind c >= 1 is under rules[c - 1]


class BlockLists(NamedTuple):
    """For each block of one side the blocks of the other side, full ones first, else ascending.

    Attributes:
        index: int32 `[B, A, R, W]`; entries from `count` on are in range and mean nothing.
        kind: int32 `[B, A, R, W]`: 0 for no rule, c for `rules[c - 1]`.
        full: int32 `[B, A, R]`, how many entries are full.
        count: int32 `[B, A, R]`, how many entries there are.
    """

    index: jax.Array
    kind: jax.Array
    full: jax.Array
    count: jax.Array


@partial(jax.jit, static_argnums=(3, 4))
def sorted_lists(
    index: jax.Array, kind: jax.Array, partial_: jax.Array, blocks: int, kinds: int
) -> BlockLists:
    """Lists of entries in any order; those of kind -1 are left out. One sort of packed integers.

    Args:
        index: int32 `[..., W]`, 0 to blocks - 1.
        kind: int32 `[..., W]`, -1 to kinds - 1.
        partial_: bool `[..., W]`, whether the tokens of the block must be looked at.
        blocks: Blocks of the other side.
        kinds: Static.
    """
    if 3 * blocks * kinds >= 2**31:
        raise ValueError(f"{blocks} blocks of {kinds} kinds do not fit an int32; take fewer.")
    group = jnp.where(kind < 0, 2, partial_.astype(jnp.int32))
    key = jnp.sort((group * blocks + index) * kinds + jnp.maximum(kind, 0), axis=-1)
    full = jnp.sum(group == 0, -1, dtype=jnp.int32)
    count = jnp.sum(group < 2, -1, dtype=jnp.int32)
    return BlockLists(key // kinds % blocks, key % kinds, full, count)


@partial(jax.jit, static_argnums=1)
def lists_of(kinds: jax.Array, number: int) -> BlockLists:
    """The lists of a map `[B, A, R, C]` of kinds, -1 to number - 1."""
    blocks = kinds.shape[-1]
    index = jnp.arange(blocks, dtype=jnp.int32)
    return sorted_lists(index, kinds, kinds > FULL, blocks, number)


@partial(jax.jit, static_argnums=2)
def times_listed(index: jax.Array, valid: jax.Array, blocks: int) -> jax.Array:
    """How often each of `blocks` blocks stands in lists [..., W]; what is out of range is not."""
    index = jnp.where(valid & (index >= 0), index, blocks)

    def line(index: jax.Array) -> jax.Array:
        return jnp.zeros(blocks, jnp.int32).at[index].add(1, mode="drop")

    for _ in index.shape[:-1]:
        line = jax.vmap(line)
    return line(index)


@partial(jax.jit, static_argnums=1)
def kinds_of(lists: BlockLists, blocks: int) -> jax.Array:
    """The map [B, A, R, blocks] of kinds that lists describe."""
    live = jnp.arange(lists.index.shape[-1]) < lists.count[..., None]
    index = jnp.where(live, lists.index, blocks)

    def line(index: jax.Array, kind: jax.Array) -> jax.Array:
        return jnp.full(blocks, NONE, jnp.int32).at[index].set(kind, mode="drop")

    for _ in index.shape[:-1]:
        line = jax.vmap(line)
    return line(index, lists.kind)
