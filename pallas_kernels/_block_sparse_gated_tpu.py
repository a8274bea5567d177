"""The gated product of two weights stored as blocks on TPU, neither factor of which reaches HBM.

The kernel is that of `_block_sparse_matmul_tpu.py`, on lines that alternate: line 2 c are the
blocks of column c of the gate, line 2 c + 1 those of the other factor. When the first ends, the
activation of its sums stays in VMEM; when the second ends, the product of both leaves. A panel of x
serves both weights.

FLOPs 2 M bk bn a stored block. Bytes: x and y once, the stored blocks of both once a panel. Two
products and an elementwise one move five arrays [M, N] and read x twice.
VMEM: see `product_bytes`, with 2 weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._block_sparse_matmul_tpu import check, launch, stacked
from pallas_kernels._block_sparse_tpu import Config, choose_config, in_scalar_memory
from pallas_kernels._compat import tpu
from pallas_kernels._topology import Topology, Visits, visits_of_lines


def forward(
    x: jax.Array,
    gate: tuple[jax.Array, Topology],
    up: tuple[jax.Array, Topology],
    activation: Callable[[jax.Array], jax.Array],
    *,
    config: Config | None = None,
    interpret: Any = False,
) -> jax.Array:
    """activation(x @ Wg) * (x @ Wu); see `block_sparse_gated`."""
    check("block_sparse_gated", x, gate[0], up[0])

    def product(x: jax.Array, gate: Any, up: Any) -> jax.Array:
        (values, topology), (others, other) = gate, up
        (m, depth), (_, bk, bn) = x.shape, values.shape
        outs, slots = topology.grid[1], topology.slots + other.slots
        chosen = config or choose_config(
            m, depth, 2 * outs, (bk, bn), slots, x.dtype, tpu(), weights=2
        )
        lists = in_scalar_memory(gated_visits(topology, other, chosen.group), slots)
        return launch(
            x, (values, others), lists, outs, chosen, activation=activation, interpret=interpret
        )

    return stacked(product, x, tuple(gate), tuple(up))


def gated_visits(gate: Topology, up: Topology, group: int) -> Visits:
    """Visits of the columns of both in turn; `slot` counts within the weight of its line."""

    def alternate(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.stack([a, b + gate.slots], 1).reshape(-1)

    lists = visits_of_lines(
        alternate(gate.col_start[:-1], up.col_start[:-1]),
        alternate(gate.col_start[1:], up.col_start[1:]),
        jnp.concatenate([gate.by_col, up.by_col + gate.slots]),
        jnp.concatenate([gate.rows, up.rows]),
        gate.grid[0],
        group,
    )
    first = jnp.where(lists.out % 2 == 1, gate.slots, 0)[:, None]
    return lists._replace(slot=jnp.where(lists.live, lists.slot - first, 0))
