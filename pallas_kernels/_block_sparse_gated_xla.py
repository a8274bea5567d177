"""The gated product of two weights stored as blocks in plain JAX: one loop over block columns.

Turns are those of `_block_sparse_matmul_xla.py`, for both weights side by side: a turn has all
blocks of some columns of the gate and of the other factor, so that g = x Wg and u = x Wu exist for
these columns only, and what is done to their entries is done in cache.

Under differentiation g and u are kept. The backward pass goes over the columns once: dg = act'(g) u
dy and du = act(g) dy of some columns, then dx and both gradients of values as for one weight. So
the extra arrays are g and u; dg and du are never whole. Computing g and u again instead would take
two products more, a third of those of the backward pass.

FLOPs 2 M bk bn a stored block forward and twice that backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
from jax import lax

from pallas_kernels._block_sparse_matmul_xla import (
    AT_ONCE,
    Turns,
    products,
    pull,
    put,
    turns_of,
    unknown_zeros,
)
from pallas_kernels._op import sum_type, vary_alike
from pallas_kernels._topology import Topology

Activation = Callable[[jax.Array], jax.Array]


class Weight(NamedTuple):
    """Values [S, bk, bn] and where they stand."""

    values: jax.Array
    topology: Topology


def gated(g: jax.Array, u: jax.Array, activation: Activation) -> jax.Array:
    """activation(g) * u in the type of sums, rounded to that of g and u."""
    wide = sum_type(g.dtype)
    return (activation(g.astype(wide)) * u.astype(wide)).astype(g.dtype)


def slopes(
    g: jax.Array, u: jax.Array, dy: jax.Array, activation: Activation
) -> tuple[jax.Array, jax.Array]:
    """Gradients of g and u for y = `gated(g, u)`, from dy."""
    wide = sum_type(dy.dtype)
    a, pull = jax.vjp(activation, g.astype(wide))
    (dg,) = pull(u.astype(wide) * dy.astype(wide))
    return dg.astype(dy.dtype), (a * dy.astype(wide)).astype(dy.dtype)


def supports(gate: Topology, up: Topology) -> bool:
    """Whether both weights have turns of whole columns: as many blocks in each, not too many."""
    return all(turns.whole for turns in _turns(gate, up))


def _turns(gate: Topology, up: Topology) -> tuple[Turns, Turns]:
    """Turns of the same columns in both."""
    columns = max(1, AT_ONCE // max((gate.fan_in or 0) + (up.fan_in or 0), 1))
    return turns_of(gate, columns * (gate.fan_in or 1)), turns_of(up, columns * (up.fan_in or 1))


@partial(jax.jit, static_argnums=3, static_argnames="keep")
def forward(
    x: jax.Array, gate: Weight, up: Weight, activation: Activation, *, keep: bool = False
) -> tuple[jax.Array, ...]:
    """(y,) for y = activation(x @ Wg) * (x @ Wu), or (y, x @ Wg, x @ Wu) with `keep`."""
    turns = _turns(gate.topology, up.topology)
    n, bn = gate.topology.grid[1] * gate.values.shape[2], gate.values.shape[2]

    def turn(t: jax.Array, out: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        parts = (products(x, w.values, of, t) for w, of in zip((gate, up), turns, strict=True))
        for column, g, u in zip(turns[0].column[t], *parts, strict=True):
            found = (activation(g) * u, g, u)[: len(out)]
            out = tuple(
                put(whole, part.astype(x.dtype), column * bn, add=False)
                for whole, part in zip(out, found, strict=True)
            )
        return out

    start = unknown_zeros((x.shape[0], n), x.dtype, gate.topology)
    start = vary_alike(start, x, gate.values, up.values)[0]
    return lax.fori_loop(0, turns[0].steps, turn, (start,) * (3 if keep else 1))


@partial(jax.jit, static_argnums=6)
def gradients(
    x: jax.Array,
    dy: jax.Array,
    g: jax.Array,
    u: jax.Array,
    gate: Weight,
    up: Weight,
    activation: Activation,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of x and of the values of gate and up, from dy [M, N] and what was kept."""
    turns, bn = _turns(gate.topology, up.topology), gate.values.shape[2]
    xt = lax.optimization_barrier(x.T)  # else XLA folds it into the products

    def turn(t: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        dx, dgate, dup = carry
        dg, du = [], []
        for c in turns[0].column[t]:
            part = partial(lax.dynamic_slice_in_dim, start_index=c * bn, slice_size=bn, axis=1)
            slope = slopes(part(g), part(u), part(dy), activation)
            dg.append(slope[0])
            du.append(slope[1])
        dx, dgate = pull(xt, dg, gate.values, turns[0], t, dx, dgate)
        dx, dup = pull(xt, du, up.values, turns[1], t, dx, dup)
        return dx, dgate, dup

    start = [
        unknown_zeros(a.shape, dtype, gate.topology)
        for a, dtype in (
            (x, sum_type(x.dtype)),
            (gate.values, gate.values.dtype),
            (up.values, up.values.dtype),
        )
    ]
    start = vary_alike(*start, x, dy, gate.values, up.values)[:3]
    dx, dgate, dup = lax.fori_loop(0, turns[0].steps, turn, start)
    return dx.astype(x.dtype), dgate, dup
