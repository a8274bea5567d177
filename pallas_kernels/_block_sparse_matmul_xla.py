"""Block-sparse matmul in plain JAX: the fast form on a CPU, the fallback and the oracle elsewhere.

A loop over block columns. Each turn joins the stored blocks of a column into one [g * bk, bn]
matrix and the matching columns of x into [M, g * bk], so that the work is a few large products
instead of many small ones, and nothing of the size of the dense weight is ever made. The backward
pass goes over the same columns once for both gradients: dx += dy_c W_c^T, added into the columns of
x that were read, and dW_c = x_c^T dy_c, the gradient at the stored blocks and nothing else.

Both are compiled whole even where the caller is not: op by op they are slow, and XLA in JAX 0.12
fails to compile the loop alone under vmap.

FLOPs 2 M bk bn a stored block forward and twice that backward. Bytes beyond the operands: the
joined columns of x, M bk a stored block, written and read once, which stay in cache.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._op import sum_type
from pallas_kernels._topology import Topology, visits

MOST = 16  # blocks joined in one turn: beyond, products gain nothing and programs grow


class _Turns(NamedTuple):
    """What each turn of the loop works on; fields as in `Visits`."""

    slot: jax.Array
    row: jax.Array
    live: jax.Array
    column: jax.Array
    steps: Any  # an int if it follows from shapes
    together: bool  # whether the slots of a turn follow each other


def _turns(topology: Topology) -> _Turns:
    (r, c), width = topology.grid, topology.fan_in
    joined = max((g for g in range(1, MOST + 1) if width and width % g == 0), default=0)
    if width and joined >= min(width, 4):
        rows = topology.rows.reshape(-1, joined)
        slot = jnp.arange(rows.size, dtype=jnp.int32).reshape(rows.shape)
        column = jnp.arange(rows.shape[0], dtype=jnp.int32) // (width // joined)
        row = jnp.minimum(rows, r - 1)
        return _Turns(slot, row, rows < r, column, rows.shape[0], True)
    lists = visits(topology, max(1, min(MOST, topology.slots // c)))
    return _Turns(lists.slot, lists.source, lists.live, lists.out, lists.steps, False)


def _blocks(values: jax.Array, turns: _Turns, t: jax.Array) -> jax.Array:
    """The stored blocks of a turn, one below the other: [g * bk, bn], zero where there is none."""
    slot, live = turns.slot[t], turns.live[t]
    if turns.together:
        blocks = lax.dynamic_slice_in_dim(values, slot[0], slot.shape[0])
    else:
        blocks = values[slot]
    blocks = jnp.where(live[:, None, None], blocks, jnp.zeros((), blocks.dtype))
    return blocks.reshape(-1, values.shape[-1])


def _joined(x: jax.Array, rows: jax.Array, size: int) -> jax.Array:
    """Columns of x that belong to block rows: [M, g * size]."""
    parts = [lax.dynamic_slice_in_dim(x, r * size, size, axis=1) for r in rows]
    return jnp.concatenate(parts, axis=1)


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int], dtype: Any) -> jax.Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=dtype)


def _add(out: jax.Array, part: jax.Array, begin: jax.Array) -> jax.Array:
    """Add a panel to columns of `out`, in place inside a loop."""
    old = lax.dynamic_slice_in_dim(out, begin, part.shape[1], axis=1)
    return lax.dynamic_update_slice_in_dim(out, old + part, begin, axis=1)


@partial(jax.jit, static_argnums=3)
def matmul(x: jax.Array, values: jax.Array, topology: Topology, transpose: bool) -> jax.Array:
    """X @ W, or x @ W^T with `transpose`; see `block_sparse_matmul`."""
    turns, (r, c) = _turns(topology), topology.grid
    _, bk, bn = values.shape
    wide = sum_type(x.dtype)

    def forward(t: jax.Array, out: jax.Array) -> jax.Array:
        part = _dot(_joined(x, turns.row[t], bk), _blocks(values, turns, t), (1, 0), wide)
        return _add(out, part, turns.column[t] * bn)

    def backward(t: jax.Array, out: jax.Array) -> jax.Array:
        column = lax.dynamic_slice_in_dim(x, turns.column[t] * bn, bn, axis=1)
        return _spread(out, _dot(column, _blocks(values, turns, t), (1, 1), wide), turns.row[t], bk)

    size = r * bk if transpose else c * bn
    start = jnp.zeros((x.shape[0], size), wide)
    turn = backward if transpose else forward
    return lax.fori_loop(0, turns.steps, turn, start).astype(x.dtype)


def _spread(out: jax.Array, parts: jax.Array, rows: jax.Array, size: int) -> jax.Array:
    """Add the panels of [M, g * size] to the columns of `out` that belong to block rows."""
    for j in range(rows.shape[0]):
        out = _add(out, parts[:, j * size : (j + 1) * size], rows[j] * size)
    return out


@jax.jit
def gradients(
    x: jax.Array, dy: jax.Array, values: jax.Array, topology: Topology
) -> tuple[jax.Array, jax.Array]:
    """Gradients of x [M, K] and of the values, for y = x @ W, from dy [M, N]."""
    turns = _turns(topology)
    _, bk, bn = values.shape
    wide = sum_type(x.dtype)

    def body(t: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dx, dvalues = carry
        rows, live, slot = turns.row[t], turns.live[t], turns.slot[t]
        column = lax.dynamic_slice_in_dim(dy, turns.column[t] * bn, bn, axis=1)
        dx = _spread(dx, _dot(column, _blocks(values, turns, t), (1, 1), wide), rows, bk)
        blocks = _dot(_joined(x, rows, bk), column, (0, 0), wide).reshape(-1, bk, bn)
        blocks = jnp.where(live[:, None, None], blocks, 0).astype(values.dtype)
        if turns.together:
            dvalues = lax.dynamic_update_slice_in_dim(dvalues, blocks, slot[0], axis=0)
        else:
            beyond = jnp.where(live, slot, values.shape[0])
            dvalues = dvalues.at[beyond].set(blocks, mode="drop")
        return dx, dvalues

    start = jnp.zeros(x.shape, wide), jnp.zeros_like(values)
    dx, dvalues = lax.fori_loop(0, turns.steps, body, start)
    return dx.astype(x.dtype), dvalues
