"""The gradient of a weight stored as blocks, on Hopper: dW_s = x[:, row(s)]^T dy[:, col(s)].

A CTA sums a pair of tiles that read the same columns of dy, one for each multiplying warpgroup, 64
rows of x a step. The two lie side by side in one block where bk gives an even number of tiles, else
in two blocks of one block column (`visits`); where a column has no second block its warpgroup
rests. Slots not in use are an extra column, which is met without a step, so they get zeros.

Where pairs are fewer than SMs, the rows of x are cut into `splits` parts, whose float32 sums are
added afterwards: the same result every time, without atomics.

FLOPs 2 M bk bn a stored block. Bytes into shared memory as for the product.
Shared memory: see `shared_bytes`.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._block_sparse_gpu import (
    DEPTH,
    GROUPS,
    Config,
    Ring,
    choose_gradient_config,
    divide,
    launch,
    padded,
    run,
    stacked,
    store,
    tiled,
)
from pallas_kernels._topology import Topology, Visits, visits


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Static sizes of a gradient. A visit is of `pair` blocks of a line."""

    batch: int
    visits: int  # of each weight
    pair: int
    columns: int  # of each weight; a line beyond is that of slots not in use
    slots: int  # of all weights
    bk: int
    bn: int
    steps: int  # of each split
    all_steps: int  # of a weight
    config: Config

    @property
    def parts(self) -> tuple[int, int]:
        """Pairs of tiles along the rows and tiles along the columns of a visit."""
        return self.bk * self.pair // (GROUPS * self.config.rows), self.bn // self.config.cols

    @property
    def items(self) -> int:
        down, across = self.parts
        return self.config.splits * self.batch * self.visits * down * across


def _gradient_kernel(
    slot,  # int32 [B * visits * pair], over all weights
    source,  # int32 [B * visits * pair]
    count,  # int32 [B * visits], blocks of a visit
    out,  # int32 [B * visits]
    x,  # [B, M, K]
    dy,  # [B, M, N]
    gradients,  # [splits * B * S, bk, bn]
    x_ring,  # shared memory [stages, 2, 64, rows]
    dy_ring,  # shared memory [stages, 64, cols]
    chunks,
    full,
    empty,
    *,
    shape: _Shape,
):
    config, ring = shape.config, Ring(full, empty, shape.config.stages)
    rows, cols = config.rows, config.cols
    down, across = shape.parts

    def place(item):
        """Split, visit over all weights, tile along rows of the first warpgroup, along columns."""
        item, col = divide(item, across)
        item, row = divide(item, down)
        split, visit = divide(item, shape.batch * shape.visits)
        return split, visit, row * (GROUPS // shape.pair), col

    def steps_of(split, visit):
        left = jnp.minimum(shape.steps, shape.all_steps - split * shape.steps)
        work = (count[visit] > 0) & (out[visit] < shape.columns)
        return jnp.where(work, jnp.maximum(left, 0), 0)

    def entry(visit, row, group):
        """Entry of a warpgroup in the lists, and its tile along the rows of that block."""
        if shape.pair == 1:
            return visit, row + group
        return visit * shape.pair + group, row

    def fetch(item, step):
        split, visit, row, col = place(item)
        steps = steps_of(split, visit)
        weight = lax.div(visit, jnp.int32(shape.visits))
        first = split * shape.steps
        places = [entry(visit, row, group) for group in range(GROUPS)]
        x_cols = [source[at] * shape.bk + tile * rows for at, tile in places]
        dy_col = out[visit] * shape.bn + col * cols

        def one(i, _):
            def copies(to, barrier):
                tokens = pl.ds((first + i) * DEPTH, DEPTH)
                for group, begin in enumerate(x_cols):
                    columns = x.at[weight, tokens, pl.ds(begin, rows)]
                    plgpu.copy_gmem_to_smem(columns, x_ring.at[to, group], barrier)
                columns = dy.at[weight, tokens, pl.ds(dy_col, cols)]
                plgpu.copy_gmem_to_smem(columns, dy_ring.at[to], barrier)

            ring.fill(step + i, copies)

        lax.fori_loop(0, steps, one, None)
        return step + steps

    def compute(group, item, step):
        split, visit, row, col = place(item)
        steps = steps_of(split, visit)
        at, tile = entry(visit, row, group)
        live = count[visit] > (0 if shape.pair == 1 else group)

        @pl.when(live)
        def _():
            def accumulate(sums):
                def product(at):
                    plgpu.wgmma(sums, x_ring.at[at, group].transpose((1, 0)), dy_ring.at[at])

                ring.multiply(step, steps, product)
                return sums[...]

            total = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((rows, cols), jnp.float32))
            to = gradients.at[
                split * shape.slots + slot[at],
                pl.ds(tile * rows, rows),
                pl.ds(col * cols, cols),
            ]
            store(total, to, chunks.at[group], lambda sums, _: sums)

        pl.when(~live)(lambda: ring.skip(step, steps))
        return step + steps

    run(ring, shape.items, config.sms, fetch, compute)


def _visits(topology: Topology, pair: int) -> Visits:
    """Visits of a topology with one leading axis; slots count over all weights.

    Slots that are not in use come last in `by_col`: they become a line of their own.
    """
    slots = topology.slots
    start = topology.col_start
    last = jnp.full((start.shape[0], 1), slots, start.dtype)
    start = jnp.concatenate([start, last], axis=1)
    extended = dataclasses.replace(topology, col_start=start)
    lists = jax.vmap(lambda t: visits(t, pair))(extended)
    first = jnp.arange(start.shape[0], dtype=jnp.int32) * slots
    return lists._replace(slot=lists.slot + first[:, None, None])


@partial(jax.jit, static_argnames=("block", "config", "interpret"))
def gradient(
    x: jax.Array,
    dy: jax.Array,
    topology: Topology,
    block: tuple[int, int],
    *,
    config: Config | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Gradient [S, bk, bn] of values stored as blocks, for y = x @ W, from x [M, K], dy [M, N]."""
    function = partial(_gradient, block=block, config=config, interpret=interpret)
    return stacked(function, *jax.tree.map(lambda leaf: leaf[None], (x, dy, topology)))[0]


def _gradient(
    x: jax.Array,  # [B, M, K]
    dy: jax.Array,  # [B, M, N]
    topology: Topology,
    *,
    block: tuple[int, int],
    config: Config | None,
    interpret: Any,
) -> jax.Array:
    (batch, m, _), (bk, bn), slots = x.shape, block, topology.slots
    columns = topology.grid[1]

    def pair(rows: int) -> int:
        return 1 if bk // rows % GROUPS == 0 else GROUPS

    config = config or choose_gradient_config(m, batch * slots, block)
    lists = _visits(topology, pair(config.rows))
    x, dy = padded(x), padded(dy)
    all_steps = -(-m // DEPTH)
    shape = _Shape(
        batch=batch,
        visits=lists.out.shape[1],
        pair=pair(config.rows),
        columns=columns,
        slots=batch * slots,
        bk=bk,
        bn=bn,
        steps=-(-all_steps // config.splits),
        all_steps=all_steps,
        config=config,
    )
    buffers = [
        plgpu.SMEM((config.stages, *tile), x.dtype, transforms=tiled(tile[-1], x.dtype))
        for tile in ((GROUPS, DEPTH, config.rows), (DEPTH, config.cols))
    ]
    sums = x.dtype if config.splits == 1 else jnp.float32
    out = jax.ShapeDtypeStruct((config.splits * batch * slots, bk, bn), sums)
    values = launch(
        partial(_gradient_kernel, shape=shape),
        "block_sparse_gradient",
        config,
        out,
        buffers,
        GROUPS + 1,
        interpret,
        [
            lists.slot.reshape(-1),
            lists.source.reshape(-1),
            lists.live.sum(2, dtype=jnp.int32).reshape(-1),
            lists.out.reshape(-1),
            x,
            dy,
        ],
    )
    values = values.reshape(config.splits, batch, slots, bk, bn)
    return values[0] if config.splits == 1 else values.sum(0).astype(x.dtype)
