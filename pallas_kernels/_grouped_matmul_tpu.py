"""Grouped matmul on TPU: the rows of each group times its matrix, or times its transpose for dX.

Grid (cores, tiles of columns, visits), with as many visits as the groups need; see
`_grouped_tpu.py`. A step multiplies a tile of tm rows, all of their length, with tn columns of the
matrix of a group, and writes the rows of that group. A tile in which groups meet stays in VMEM
until the last of them has written its rows, and where half of it has them all, half is multiplied.

The columns of a matrix come by hand-made DMA into one of two buffers when the group before begins,
so they have the time of a whole group to arrive, and each matrix is read once. Tiles of x and of
the result come and go by BlockSpec.

FLOPs 2 T K N, and 2 tm K N for every tile that a group shares with another. Bytes: w and y once, x
once for every tile of columns. So a group of m rows in bfloat16 gives m FLOPs a byte of its matrix:
below the ridge, 240 on v5e, 187 on v5p, 561 on v6e and 312 on TPU7x, the way of w from HBM bounds.
VMEM: see `product_bytes`. dW: `_grouped_gradient_tpu.py`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._block_sparse_tpu import compiler_params, cost
from pallas_kernels._compat import tpu
from pallas_kernels._grouped_gradient_tpu import gradient
from pallas_kernels._grouped_tpu import Config, choose_config, supports, visits
from pallas_kernels._op import in_turn, result_like

ROWS = 32  # least rows of half a tile


def _product_kernel(
    turn,  # SMEM [V]
    tile,  # SMEM [V]
    lo,  # SMEM [V]
    hi,  # SMEM [V]
    groups,  # SMEM [E + 1]
    used,  # SMEM [1]
    x_ref,  # VMEM [tm, depth]
    w_hbm,  # HBM [E, depth, N], or [E, N, depth]
    y_ref,  # VMEM [tm, tn]
    matrices,  # VMEM [2, depth, tn], or [2, tn, depth]
    sums,  # VMEM [tm, tn] float32
    here,  # DMA semaphores [2]
    *,
    transpose: bool,
    tk: int,
):
    core, j, v = (pl.program_id(axis) for axis in range(3))
    tiles = pl.num_programs(1)
    (tm, depth), tn = x_ref.shape, y_ref.shape[1]
    u, last_turn = turn[v], used[0] - 1
    live = hi[v] > lo[v]
    before = jnp.maximum(v - 1, 0)
    first = live & ((v == 0) | (turn[before] != u))
    fresh = (v == 0) | (tile[before] != tile[v])
    buffer = lax.rem(j * used[0] + u, 2)
    n = w_hbm.shape[1 if transpose else 2]

    def copy(at, column, to, do):
        """Start or await tn columns of a matrix, or those that are left of it."""
        begin = pl.multiple_of(column * tn, 128)

        def part(size):
            columns = pl.ds(begin, size)
            source = w_hbm.at[groups[at]]
            if transpose:
                pair = source.at[columns], matrices.at[to, pl.ds(0, size)]
            else:
                pair = source.at[:, columns], matrices.at[to, :, pl.ds(0, size)]
            do(pltpu.make_async_copy(*pair, here.at[to]))

        if n % tn == 0:
            part(tn)
            return
        inside = (column + 1) * tn <= n
        pl.when(inside)(lambda: part(tn))
        pl.when(~inside)(lambda: part(n % tn))

    def start(c):
        c.start()

    def wait(c):
        c.wait()

    column = core * tiles + j

    @pl.when((j == 0) & (v == 0) & (last_turn >= 0))
    def _():
        copy(0, column, 0, start)

    @pl.when(first)
    def _():
        copy(u, column, buffer, wait)
        over = u == last_turn

        @pl.when(~(over & (j == tiles - 1)))
        def _():
            following = lax.select(over, 0, u + 1)
            copy(following, lax.select(over, column + 1, column), 1 - buffer, start)

    count = hi[v] - lo[v]

    @pl.when(fresh & (count < tm))
    def _():
        y_ref[...] = jnp.zeros_like(y_ref)

    def visit(begin, size):
        """Multiply the rows from `begin` on, and write those of the group."""
        rows = pl.ds(begin, size)

        def product(at):
            piece = pl.ds(pl.multiple_of(at, 128), tk)
            w = matrices[buffer, :, piece] if transpose else matrices[buffer, piece]
            dims = (((1,), (1 if transpose else 0,)), ((), ()))
            return lax.dot_general(x_ref[rows, piece], w, dims, preferred_element_type=jnp.float32)

        if tk == depth:
            total = product(0)
        else:
            sums[rows] = product(0)

            def add(i, _):
                sums[rows] += product(i * tk)

            lax.fori_loop(1, depth // tk, add, None)
            total = sums[rows]
        row = begin + lax.broadcasted_iota(jnp.int32, (size, tn), 0)
        own = (row >= lo[v]) & (row < hi[v])
        y_ref[rows] = jnp.where(own, total.astype(y_ref.dtype), y_ref[rows])

    # A narrow tile costs the MXU little more than its share: take half a tile where it suffices.
    half = tm // 2
    if half % ROWS:
        pl.when(live)(lambda: visit(0, tm))
        return
    upper = lo[v] >= half
    suffices = upper | (hi[v] <= half)
    begin = pl.multiple_of(lax.select(upper, half, 0), ROWS)
    pl.when(live & suffices)(lambda: visit(begin, half))
    pl.when(live & ~suffices)(lambda: visit(0, tm))


def matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    transpose_w: bool,
    *,
    config: Config | None = None,
    interpret: Any = False,
) -> jax.Array:
    """The rows of each group of x [T, K] times its matrix; see `grouped_matmul`."""
    check(x, w)

    @jax.custom_batching.custom_vmap
    def run(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return _matmul(x, w, group_sizes, transpose_w, config, interpret)

    @run.def_vmap
    def _(size: int, batched: Any, *operands: Any):
        return in_turn(run, batched, *operands), True

    return run(x, w, group_sizes)


def check(x: jax.Array, w: jax.Array) -> None:
    """Raise NotImplementedError for what `supports` refuses."""
    reason = supports(x.dtype, x.shape[0], *w.shape)
    if reason:
        raise NotImplementedError(f"grouped_matmul: {reason}. Take implementation='xla'.")


def _matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    transpose: bool,
    config: Config | None,
    interpret: Any,
) -> jax.Array:
    device = tpu()
    (t, depth), e, n = x.shape, w.shape[0], w.shape[1 if transpose else 2]
    chosen = config or choose_config(t, e, depth, n, x.dtype, device)
    tm, tn, cores = chosen.tm, chosen.tn, chosen.cores
    lists = visits(group_sizes, t, tm)
    columns = -(-n // (tn * cores))
    matrix = (2, tn, depth) if transpose else (2, depth, tn)

    def x_block(core, j, v, turn, tile, *_):
        return tile[v], 0

    def y_block(core, j, v, turn, tile, *_):
        return tile[v], core * columns + j

    return pl.pallas_call(
        partial(_product_kernel, transpose=transpose, tk=chosen.tk),
        out_shape=result_like(x, (t, n)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(cores, columns, lists.steps),
            in_specs=[
                pl.BlockSpec((tm, depth), x_block),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec((tm, tn), y_block),
            scratch_shapes=[
                pltpu.VMEM(matrix, w.dtype),
                pltpu.VMEM((tm, tn), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=compiler_params(device, 3),
        cost_estimate=cost(
            t, depth * n, x.nbytes * columns * cores + w.nbytes + t * n * x.dtype.itemsize
        ),
        interpret=interpret,
        name="grouped_matmul",
    )(*lists[:6], x, w)


def gradients(
    x: jax.Array,
    dy: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    transpose_w: bool,
    *,
    config: Config | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of x [T, K] and of w, from dy [T, N]; `config` is of the second."""
    dx = matmul(dy, w, group_sizes, not transpose_w, interpret=interpret)
    left, right = (dy, x) if transpose_w else (x, dy)
    dw = gradient(left, right, group_sizes, config=config, interpret=interpret)
    return dx, dw
