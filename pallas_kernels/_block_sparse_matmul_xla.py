"""Block-sparse matmul in plain JAX: the fast form on a CPU, the fallback and the oracle elsewhere.

A loop over block columns. Each turn joins the stored blocks of a column into one [g * bk, bn]
matrix and the matching columns of x into [M, g * bk], so that the work is a few large products
instead of many small ones, and nothing of the size of the dense weight is ever made. Where columns
have few blocks a turn takes several, whose products then run side by side. The backward pass goes
over the same columns once for both gradients: dx += dy_c W_c^T, added into the columns of x that
were read, and dW_c = x_c^T dy_c, the gradient at the stored blocks and nothing else. For the second
x is transposed once: on a CPU a product that contracts the first axes takes twice the time.

Both are compiled whole even where the caller is not: op by op they are slow, and XLA in JAX 0.12
fails to compile the loop alone under vmap.

FLOPs 2 M bk bn a stored block forward and twice that backward. Bytes beyond the operands: the
joined columns of x, M bk a stored block, written and read once, which stay in cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._op import finish, sum_type, vary_alike
from pallas_kernels._topology import Topology, visits

MOST = 16  # blocks joined in one turn: beyond, products gain nothing and programs grow
AT_ONCE = 8  # blocks of several columns in one turn: small products run side by side


class Turns(NamedTuple):
    """What each turn of the loop works on, u columns of g blocks; fields as in `Visits`."""

    slot: jax.Array  # [turns, u, g]
    row: jax.Array  # [turns, u, g]
    live: jax.Array  # [turns, u, g]
    column: jax.Array  # [turns, u]
    steps: Any  # an int if it follows from shapes
    together: bool  # whether the slots of a turn follow each other
    whole: bool  # whether a turn has all blocks of its columns


def _divisor(size: int, most: int) -> int:
    return max((d for d in range(1, most + 1) if size and size % d == 0), default=0)


def turns_of(topology: Topology, at_once: int = AT_ONCE) -> Turns:
    """The turns of a loop over block columns; at_once: blocks of several columns in a turn."""
    (r, c), width = topology.grid, topology.fan_in or 0
    g = _divisor(width, MOST)
    if width and g >= min(width, 4):
        u = _divisor(c, max(1, at_once // g)) if g == width else 1
        row = topology.rows.reshape(-1, u, g)
        slot = jnp.arange(row.size, dtype=jnp.int32).reshape(row.shape)
        column = slot[..., 0] // width
        return Turns(slot, jnp.minimum(row, r - 1), row < r, column, len(row), True, g == width)
    lists = visits(topology, max(1, min(MOST, topology.slots // c)))
    slot, row, live, column = (a[:, None] for a in lists[:4])
    return Turns(slot, row, live, column, lists.steps, False, False)


def _blocks(values: jax.Array, turns: Turns, t: jax.Array, dtype: Any) -> jax.Array:
    """The stored blocks of a turn, those of a column one below the other: [u, g * bk, bn].

    Zero where there is none. Of the type of the products, in which they need not be stored.
    """
    slot, live = turns.slot[t], turns.live[t]
    if turns.together:
        blocks = lax.dynamic_slice_in_dim(values, slot[0, 0], slot.size)
        blocks = blocks.reshape(*slot.shape, *values.shape[1:])
    else:
        blocks = values[slot]
    blocks = jnp.where(live[..., None, None], blocks, jnp.zeros((), blocks.dtype))
    return blocks.reshape(len(slot), -1, values.shape[-1]).astype(dtype)


def _joined(x: jax.Array, rows: jax.Array, size: int, axis: int = 1) -> jax.Array:
    """Columns of x that belong to block rows, [M, g * size]; or rows of x^T, `axis` 0."""
    parts = [lax.dynamic_slice_in_dim(x, r * size, size, axis) for r in rows]
    return jnp.concatenate(parts, axis)


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int], dtype: Any) -> jax.Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=dtype)


def put(out: jax.Array, part: jax.Array, begin: jax.Array, *, add: bool = True) -> jax.Array:
    """Write a panel to columns of `out`, or add it, in place inside a loop."""
    if add:
        part = part + lax.dynamic_slice_in_dim(out, begin, part.shape[1], axis=1)
    return lax.dynamic_update_slice_in_dim(out, part, begin, axis=1)


def unknown_zeros(shape: tuple[int, ...], dtype: Any, topology: Topology) -> jax.Array:
    """Zeros that are not known to be zeros: XLA keeps one array of known ones, and copies it."""
    return jnp.broadcast_to((topology.rows[0] < 0).astype(dtype), shape)


def products(x: jax.Array, values: jax.Array, turns: Turns, t: jax.Array) -> list[jax.Array]:
    """The u columns [M, bn] of x @ W, or their parts, of a turn."""
    return [
        _dot(_joined(x, rows, values.shape[1]), w, (1, 0), sum_type(x.dtype))
        for rows, w in zip(turns.row[t], _blocks(values, turns, t, x.dtype), strict=True)
    ]


@partial(jax.jit, static_argnums=3, static_argnames="activation")
def matmul(
    x: jax.Array,
    values: jax.Array,
    topology: Topology,
    transpose: bool,
    *,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """X @ W, or x @ W^T with `transpose`; see `block_sparse_matmul`."""
    turns, (r, c) = turns_of(topology), topology.grid
    _, bk, bn = values.shape
    wide = sum_type(x.dtype)

    def forward(t: jax.Array, out: jax.Array) -> jax.Array:
        for part, column in zip(products(x, values, turns, t), turns.column[t], strict=True):
            out = put(out, part, column * bn, add=not turns.whole)
        return out

    def backward(t: jax.Array, out: jax.Array) -> jax.Array:
        blocks = _blocks(values, turns, t, x.dtype)
        parts = [
            _dot(lax.dynamic_slice_in_dim(x, column * bn, bn, axis=1), w, (1, 1), wide)
            for column, w in zip(turns.column[t], blocks, strict=True)
        ]
        return _spread(out, parts, turns.row[t], bk)

    size = r * bk if transpose else c * bn
    start = unknown_zeros((x.shape[0], size), wide, topology)
    start, _, _ = vary_alike(start, x, values)
    sums = lax.fori_loop(0, turns.steps, backward if transpose else forward, start)
    return finish(sums, bias, activation).astype(x.dtype)


def _spread(out: jax.Array, parts: list[jax.Array], rows: jax.Array, size: int) -> jax.Array:
    """Add the panels of u parts [M, g * size] to the columns of `out` of block rows [u, g]."""
    for part, places in zip(parts, rows, strict=True):
        for j, row in enumerate(places):
            out = put(out, part[:, j * size : (j + 1) * size], row * size)
    return out


def pull(
    xt: jax.Array,
    columns: list[jax.Array],
    values: jax.Array,
    turns: Turns,
    t: jax.Array,
    dx: jax.Array,
    dvalues: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Add to dx [M, K] what a turn gives, and set its dvalues, from u columns [M, bn] of dy."""
    _, bk, bn = values.shape
    rows, live, slot = turns.row[t], turns.live[t], turns.slot[t]
    weights = _blocks(values, turns, t, xt.dtype)
    parts = [_dot(d, w, (1, 1), dx.dtype) for d, w in zip(columns, weights, strict=True)]
    blocks = [
        _dot(_joined(xt, places, bk, axis=0), d, (1, 0), dx.dtype).reshape(-1, bk, bn)
        for places, d in zip(rows, columns, strict=True)
    ]
    dx = _spread(dx, parts, rows, bk)
    found = jnp.where(live.reshape(-1, 1, 1), jnp.concatenate(blocks), 0).astype(values.dtype)
    if turns.together:
        return dx, lax.dynamic_update_slice_in_dim(dvalues, found, slot[0, 0], axis=0)
    beyond = jnp.where(live, slot, values.shape[0]).reshape(-1)
    return dx, dvalues.at[beyond].set(found, mode="drop")


@jax.jit
def gradients(
    x: jax.Array, dy: jax.Array, values: jax.Array, topology: Topology
) -> tuple[jax.Array, jax.Array]:
    """Gradients of x [M, K] and of the values, for y = x @ W, from dy [M, N]."""
    turns = turns_of(topology)
    bn, wide = values.shape[-1], sum_type(x.dtype)
    xt = lax.optimization_barrier(x.T)  # else XLA folds it into the products

    def body(t: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        columns = [lax.dynamic_slice_in_dim(dy, c * bn, bn, axis=1) for c in turns.column[t]]
        return pull(xt, columns, values, turns, t, *carry)

    start = (
        unknown_zeros(x.shape, wide, topology),
        unknown_zeros(values.shape, values.dtype, topology),
    )
    start = vary_alike(*start, x, dy, values)[:2]
    dx, dvalues = lax.fori_loop(0, turns.steps, body, start)
    return dx.astype(x.dtype), dvalues
