"""The gradient of the matrices of grouped matmul on TPU: dW_g = x_g^T dy_g.

Grid (cores, tiles of tk columns of x, tiles of tn columns of dy, visits); see `_grouped_tpu.py`.
Here every group is visited, one without rows once, so that its gradient is written. A step adds the
product of a tile of x and one of dy to sums [tk, tn], which leave with the last visit of a group.
Rows of other groups are cleared in both tiles: zero times infinity is not zero.

FLOPs 2 T K N, and 2 tm K N for every tile that a group shares with another. Bytes: x once for every
tile of columns of dy, dy once for every tile of columns of x, dW once.
VMEM: see `gradient_bytes`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._block_sparse_tpu import compiler_params, cost
from pallas_kernels._compat import tpu
from pallas_kernels._grouped_tpu import Config, choose_config, visits
from pallas_kernels._op import in_turn, result_like


def _gradient_kernel(
    turn,  # SMEM [V]
    tile,  # SMEM [V]
    lo,  # SMEM [V]
    hi,  # SMEM [V]
    groups,  # SMEM [E + 1]
    used,  # SMEM [1]
    x_ref,  # VMEM [tm, tk]
    dy_ref,  # VMEM [tm, tn]
    dw_ref,  # VMEM [tk, tn]
    sums,  # VMEM [tk, tn] float32
):
    del tile, groups, used  # the first two are read by the index maps
    v, steps = pl.program_id(3), pl.num_programs(3)
    first = (v == 0) | (turn[jnp.maximum(v - 1, 0)] != turn[v])
    last = (v == steps - 1) | (turn[jnp.minimum(v + 1, steps - 1)] != turn[v])
    live = hi[v] > lo[v]

    def own(ref):
        row = lax.broadcasted_iota(jnp.int32, ref.shape, 0)
        inside = (row >= lo[v]) & (row < hi[v])
        return jnp.where(inside, ref[...], jnp.zeros((), ref.dtype))

    @pl.when(live)
    def _():
        dims = (((0,), (0,)), ((), ()))
        x, dy = own(x_ref), own(dy_ref)
        product = lax.dot_general(x, dy, dims, preferred_element_type=jnp.float32)
        sums[...] = jnp.where(first, 0.0, sums[...]) + product

    @pl.when(~live)
    def _():
        sums[...] = jnp.zeros_like(sums)

    @pl.when(last)
    def _():
        dw_ref[...] = sums[...].astype(dw_ref.dtype)


def gradient(
    x: jax.Array,
    dy: jax.Array,
    group_sizes: jax.Array,
    *,
    config: Config | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Gradient [E, K, N] of w for y = x @ w by groups, from x [T, K] and dy [T, N]."""

    @jax.custom_batching.custom_vmap
    def run(x: jax.Array, dy: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return _gradient(x, dy, group_sizes, config, interpret)

    @run.def_vmap
    def _(size: int, batched: Any, *operands: Any):
        return in_turn(run, batched, *operands), True

    return run(x, dy, group_sizes)


def _gradient(
    x: jax.Array, dy: jax.Array, group_sizes: jax.Array, config: Config | None, interpret: Any
) -> jax.Array:
    device = tpu()
    (t, k), n, e = x.shape, dy.shape[1], group_sizes.shape[0]
    chosen = config or choose_config(t, e, k, n, x.dtype, device, gradient=True)
    tm, tn, tk, cores = chosen.tm, chosen.tn, chosen.tk, chosen.cores
    lists = visits(group_sizes, t, tm, empty=True)
    columns, rows = -(-n // tn), -(-k // (tk * cores))

    def x_block(core, i, j, v, turn, tile, *_):
        return tile[v], core * rows + i

    def dy_block(core, i, j, v, turn, tile, *_):
        return tile[v], j

    def dw_block(core, i, j, v, turn, tile, lo, hi, groups, used):
        return groups[turn[v]], core * rows + i, j

    size = e * k * n
    moved = x.nbytes * columns + dy.nbytes * rows * cores + size * x.dtype.itemsize
    return pl.pallas_call(
        _gradient_kernel,
        out_shape=result_like(x, (e, k, n)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(cores, rows, columns, lists.steps),
            in_specs=[pl.BlockSpec((tm, tk), x_block), pl.BlockSpec((tm, tn), dy_block)],
            out_specs=pl.BlockSpec((pl.squeezed, tk, tn), dw_block),
            scratch_shapes=[pltpu.VMEM((tk, tn), jnp.float32)],
        ),
        compiler_params=compiler_params(device, 4),
        cost_estimate=cost(t, k * n, moved),
        interpret=interpret,
        name="grouped_gradient",
    )(*lists[:6], x, dy)
