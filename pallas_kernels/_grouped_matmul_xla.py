"""Grouped matmul in plain JAX: the fast form on a CPU, the fallback and the oracle elsewhere.

Each group is cut into tiles of the largest size and one for the rest, of the least size that holds
it; `tile_sizes` has up to twelve. There is one loop for each size, over the tiles of it, and a turn
is one product of a tile with the matrix of its group. So a group of up to twice the mean size is
one large product, a few per cent larger than it need be, and its matrix is read once. A tile may
hang over the end of its group, or begin earlier so as not to hang over the end of x: what is not
its own is neither written nor added up, whatever it holds. Sizes of groups are data, so nothing is
compiled again when they change.

The backward pass goes over the same tiles once for both gradients, whose products then run side by
side: dx = dy W_g^T, and x^T dy, added to dW_g. x is transposed once, as in the block-sparse form.

FLOPs 2 T K N forward and twice that backward, and a few per cent for the part of tiles that hangs
over. Bytes beyond the operands: a copy of W_g a tile, in cache, and dW in float32 if it is not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._op import in_turn, sum_type, vary_alike

LEAST, MOST = 16, 512  # rows: smaller tiles gain nothing, larger ones are no faster


class Tiles(NamedTuple):
    """Tiles of V = T // top + E places, those of one size together; each of one group.

    Attributes:
        group: int32 `[V]`.
        begin: int32 `[V]`, first row of the group that the tile has.
        end: int32 `[V]`, the row after the last one.
        start: int32 `[sizes + 1]`, where the tiles of each size begin; then places not in use.
    """

    group: jax.Array
    begin: jax.Array
    end: jax.Array
    start: jax.Array


class Tile(NamedTuple):
    """What a turn works on: `size` rows from `row` on, those that are `own` [size] of `group`."""

    size: int
    group: jax.Array
    row: jax.Array
    own: jax.Array

    def rows(self, a: jax.Array) -> jax.Array:
        """The rows [size, N] of a [T, N], those of others too."""
        return lax.dynamic_slice_in_dim(a, self.row, self.size)

    def columns(self, a: jax.Array) -> jax.Array:
        """The columns [N, size] of a [N, T], zero where they are not its own."""
        part = lax.dynamic_slice_in_dim(a, self.row, self.size, axis=1)
        return jnp.where(self.own, part, jnp.zeros((), a.dtype))

    def cleared(self, a: jax.Array) -> jax.Array:
        """The rows a [size, N], zero where they are not its own."""
        return jnp.where(self.own[:, None], a, jnp.zeros((), a.dtype))

    def put(self, out: jax.Array, part: jax.Array) -> jax.Array:
        """`out` [T, N] with its own rows of `part` [size, N]."""
        part = jnp.where(self.own[:, None], part.astype(out.dtype), self.rows(out))
        return lax.dynamic_update_slice_in_dim(out, part, self.row, axis=0)

    def of(self, w: jax.Array) -> jax.Array:
        """The matrix of the group, of w [E, ...]."""
        return lax.dynamic_index_in_dim(w, self.group, keepdims=False)

    def add(self, w: jax.Array, part: jax.Array) -> jax.Array:
        """Adds `part` to the matrix of the group in w [E, ...]."""
        return lax.dynamic_update_index_in_dim(w, self.of(w) + part, self.group, axis=0)


def tile_sizes(t: int, e: int) -> tuple[int, ...]:
    """Rows of tiles, increasing, for t rows in e groups.

    The largest has twice the rows of the mean group; they grow by a sixteenth of it, then by an
    eighth, so that about a sixteenth of the rows of the tiles of a group are too many.
    """
    top = LEAST
    while top < min(MOST, 2 * t / e):
        top *= 2
    step = max(LEAST, top // 16)
    sizes = *range(step, top // 2, step), *range(max(top // 2, step), top + 1, 2 * step)
    most = min(t, top)
    return (*(size for size in sizes if size < most), most)


def tiles_of(group_sizes: jax.Array, t: int, sizes: tuple[int, ...]) -> Tiles:
    """The tiles of all groups."""
    group_sizes = group_sizes.astype(jnp.int32)
    e, top = group_sizes.shape[0], sizes[-1]
    stops = jnp.cumsum(group_sizes)
    firsts = stops - group_sizes
    counts = -(-group_sizes // top)
    ends = jnp.cumsum(counts)
    place = jnp.arange(t // top + e, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(ends, place, side="right"), e - 1).astype(jnp.int32)
    begin = firsts[group] + (place - (ends - counts)[group]) * top
    end = jnp.minimum(begin + top, stops[group])
    kind = jnp.searchsorted(jnp.array(sizes, jnp.int32), end - begin)
    kind = jnp.where(place < ends[-1], kind, len(sizes)).astype(jnp.int32)
    order = jnp.argsort(kind, stable=True)
    start = jnp.searchsorted(kind[order], jnp.arange(len(sizes) + 1, dtype=jnp.int32))
    return Tiles(group[order], begin[order], end[order], start.astype(jnp.int32))


def over_tiles(group_sizes: jax.Array, t: int, turn: Callable[[Tile, Any], Any], carry: Any) -> Any:
    """The carry after turn(tile, carry) for every tile of t rows, the small ones first."""
    sizes = tile_sizes(t, group_sizes.shape[0])
    tiles = tiles_of(group_sizes, t, sizes)
    for kind, size in enumerate(sizes):

        def one(i: jax.Array, carry: Any, size: int = size) -> Any:
            row = jnp.clip(tiles.begin[i], 0, t - size)
            at = row + jnp.arange(size, dtype=jnp.int32)
            own = (at >= tiles.begin[i]) & (at < tiles.end[i])
            return turn(Tile(size, tiles.group[i], row, own), carry)

        carry = lax.fori_loop(tiles.start[kind], tiles.start[kind + 1], one, carry)
    return carry


def unknown_zeros(
    group_sizes: jax.Array, *like: tuple[tuple[int, ...], Any]
) -> tuple[jax.Array, ...]:
    """Zeros of shapes and dtypes that XLA takes to differ: it copies where two are the same."""
    return tuple(
        jnp.broadcast_to((group_sizes[0] < -i).astype(dtype), shape)
        for i, (shape, dtype) in enumerate(like, 1)
    )


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """A product of two matrices in the type of sums."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=sum_type(a.dtype))


def turned(x: jax.Array) -> jax.Array:
    """x^T as an array of its own: a product that contracts the first axes takes longer."""
    return lax.optimization_barrier(x.T)


def one_by_one(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` of arrays; under vmap in a loop, for loops with batched bounds would copy all."""

    @jax.custom_batching.custom_vmap
    def mapped(*operands: Any) -> Any:
        return run(*operands)

    @mapped.def_vmap
    def _(size: int, batched: Any, *operands: Any) -> Any:
        out = in_turn(mapped, batched, *operands)
        return out, jax.tree.map(lambda _: True, out)

    return mapped


@partial(jax.jit, static_argnums=3)
def matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, transpose_w: bool) -> jax.Array:
    """The rows of each group of x [T, K] times its matrix; see `grouped_matmul`."""

    def run(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
        def turn(tile: Tile, out: jax.Array) -> jax.Array:
            return tile.put(out, dot(tile.rows(x), tile.of(w), (1, 1 if transpose_w else 0)))

        t, n = x.shape[0], w.shape[1 if transpose_w else 2]
        (start,) = unknown_zeros(group_sizes, ((t, n), x.dtype))
        return over_tiles(group_sizes, t, turn, vary_alike(start, x, w)[0])

    return one_by_one(run)(x, w, group_sizes)


@partial(jax.jit, static_argnums=4)
def gradients(
    x: jax.Array, dy: jax.Array, w: jax.Array, group_sizes: jax.Array, transpose_w: bool
) -> tuple[jax.Array, jax.Array]:
    """Gradients of x [T, K] and of w, from dy [T, N]."""

    def run(x: jax.Array, dy: jax.Array, w: jax.Array, group_sizes: jax.Array) -> Any:
        left, right = (dy, x) if transpose_w else (x, dy)  # dW_g = left_g^T right_g
        left = turned(left)

        def turn(tile: Tile, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            dx, dw = carry
            part = dot(tile.columns(left), tile.cleared(tile.rows(right)), (1, 0))
            rows = dot(tile.rows(dy), tile.of(w), (1, 0 if transpose_w else 1))
            return tile.put(dx, rows), tile.add(dw, part)

        start = unknown_zeros(group_sizes, (x.shape, x.dtype), (w.shape, sum_type(w.dtype)))
        start = vary_alike(*start, x, dy, w)[:2]
        dx, dw = over_tiles(group_sizes, x.shape[0], turn, start)
        return dx, dw.astype(w.dtype)

    return one_by_one(run)(x, dy, w, group_sizes)
