"""The gated feed-forward layer of experts in plain JAX: one loop over tiles of rows.

Tiles are those of `_grouped_matmul_xla.py`, and a turn does the whole layer for one of them: both
products, the activation and the third product forward; six products backward, of which five are
independent of each other once dh is there, so that they run side by side. What is done to entries
is done in cache.

Under differentiation g = x Wg and u = x Wu are kept. Computing them again would be two products
more, a third of those of the backward pass. dg, du and h = act(g) u are never whole in it.

FLOPs 6 T K H forward and twice that backward, and a few per cent for parts of tiles that hang over.
"""

from __future__ import annotations

from functools import partial

import jax

from pallas_kernels._block_sparse_gated_xla import Activation, gated, slopes
from pallas_kernels._grouped_matmul_xla import (
    Tile,
    dot,
    one_by_one,
    over_tiles,
    turned,
    unknown_zeros,
)
from pallas_kernels._op import sum_type, vary_alike


@partial(jax.jit, static_argnums=5, static_argnames="keep")
def forward(
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    group_sizes: jax.Array,
    activation: Activation,
    *,
    keep: bool = False,
) -> tuple[jax.Array, ...]:
    """(y,) of x [T, K], or (y, g, u) with `keep`; see `grouped_ffn`."""

    def run(
        x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, group_sizes: jax.Array
    ) -> tuple[jax.Array, ...]:
        def turn(tile: Tile, out: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            rows = tile.rows(x)
            g, u = (dot(rows, tile.of(w), (1, 0)) for w in (gate, up))
            y = dot((activation(g) * u).astype(x.dtype), tile.of(down), (1, 0))
            return tuple(tile.put(whole, part) for whole, part in zip(out, (y, g, u), strict=False))

        hidden = (x.shape[0], gate.shape[2]), x.dtype
        shapes = (x.shape, x.dtype), *([hidden, hidden] if keep else [])
        start = vary_alike(*unknown_zeros(group_sizes, *shapes), x, gate, up, down)
        return over_tiles(group_sizes, x.shape[0], turn, start[: len(shapes)])

    return one_by_one(run)(x, gate, up, down, group_sizes)


@partial(jax.jit, static_argnums=8)
def gradients(
    x: jax.Array,
    dy: jax.Array,
    g: jax.Array,
    u: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    group_sizes: jax.Array,
    activation: Activation,
) -> tuple[jax.Array, ...]:
    """Gradients of x, gate, up and down, from dy [T, K] and what was kept."""

    def run(*operands: jax.Array) -> tuple[jax.Array, ...]:
        x, dy, g, u, gate, up, down, group_sizes = operands
        xt = turned(x)

        def turn(tile: Tile, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dx, dgate, dup, ddown = carry
            dy_rows, g_rows, u_rows = (tile.rows(a) for a in (dy, g, u))
            dh = dot(dy_rows, tile.of(down), (1, 1)).astype(x.dtype)
            dg, du = map(tile.cleared, slopes(g_rows, u_rows, dh, activation))
            h = tile.cleared(gated(g_rows, u_rows, activation))
            rows = dot(dg, tile.of(gate), (1, 1)) + dot(du, tile.of(up), (1, 1))
            columns = tile.columns(xt)
            return (
                tile.put(dx, rows),
                tile.add(dgate, dot(columns, dg, (1, 0))),
                tile.add(dup, dot(columns, du, (1, 0))),
                tile.add(ddown, dot(h, tile.cleared(dy_rows), (0, 0))),
            )

        weights = gate, up, down
        shapes = (x.shape, x.dtype), *((w.shape, sum_type(w.dtype)) for w in weights)
        start = vary_alike(*unknown_zeros(group_sizes, *shapes), x, dy, *weights)[:4]
        dx, *found = over_tiles(group_sizes, x.shape[0], turn, start)
        return dx, *(a.astype(w.dtype) for a, w in zip(found, weights, strict=True))

    return one_by_one(run)(x, dy, g, u, gate, up, down, group_sizes)
