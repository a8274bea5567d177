"""The gradient of a weight stored as blocks, on TPU: dW_s = x[:, row(s)]^T dy[:, col(s)].

Steps are those of `visits`: `group` stored blocks of one block column. They are cut into strips of
as many steps as have float32 sums that fit VMEM, and a strip goes over all tiles of bm rows: grid
(cores, strips, tiles, steps of a strip). A tile of x is transposed once a strip, not once a block,
and the blocks of a step are one product [group * bk, bm] x [bm, bn], so dy is pushed into the MXU
once. In the last tile each block leaves by DMA to its own slot; slots not in use get a zero block.

FLOPs 2 M bk bn a stored block. Bytes: x once a strip, dy once a step, the gradients once.
VMEM: see `gradient_bytes`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._block_sparse_tpu import (
    Config,
    choose_config,
    compiler_params,
    cost,
    each,
    in_turn,
    padded,
    prefetched,
)
from pallas_kernels._compat import tpu
from pallas_kernels._op import result_like
from pallas_kernels._topology import Topology


def _gradient_kernel(
    slot,  # SMEM [steps * group]
    source,  # SMEM [steps * group]
    out,  # SMEM [steps]
    count,  # SMEM [steps]
    order,  # SMEM [S], slots in use first
    used,  # SMEM [1], how many
    x_hbm,  # HBM [M, K]
    dy_ref,  # VMEM [bm, bn]
    values_hbm,  # HBM [S, bk, bn], the gradients
    tile_ref,  # VMEM [bm, K]
    turned,  # VMEM [K, bm]
    sums,  # VMEM [strip, group * bk, bn] float32
    leaving,  # VMEM [2, group, bk, bn]
    zero,  # VMEM [bk, bn]
    tile_here,  # DMA semaphore
    left,  # DMA semaphores [2]
    zeroed,  # DMA semaphore
):
    del out  # read by the index maps
    core, part, tile, local = (pl.program_id(axis) for axis in range(4))
    strips, tiles = pl.num_programs(1), pl.num_programs(2)
    strip, bm = sums.shape[0], tile_ref.shape[0]
    _, group, bk, bn = leaving.shape
    step = (part * pl.num_programs(0) + core) * strip + local
    n = count[step]

    @pl.when((core == 0) & (part == 0) & (tile == 0) & (local == 0))
    def _():
        zero[...] = jnp.zeros_like(zero)

        def clear(i, _):
            copy = pltpu.make_async_copy(zero, values_hbm.at[order[i]], zeroed.at[0])
            copy.start()
            pl.when(i >= used[0] + 8)(copy.wait)  # 8 at a time; all are of one size

        def drain(i, _):
            pltpu.make_async_copy(zero, values_hbm.at[0], zeroed.at[0]).wait()

        lax.fori_loop(used[0], order.shape[0], clear, None)
        lax.fori_loop(0, jnp.minimum(8, order.shape[0] - used[0]), drain, None)

    def tile_copy(index):
        rows = pl.ds(pl.multiple_of(index * bm, bm), bm)
        return pltpu.make_async_copy(x_hbm.at[rows], tile_ref, tile_here.at[0])

    @pl.when((part == 0) & (tile == 0) & (local == 0))
    def _():
        tile_copy(0).start()

    @pl.when(local == 0)
    def _():
        tile_copy(tile).wait()

        def turn(row, _):
            begin = pl.multiple_of(row * bk, bk)
            turned[pl.ds(begin, bk)] = tile_ref[:, pl.ds(begin, bk)].T

        lax.fori_loop(0, turned.shape[0] // bk, turn, None)

        @pl.when(~((part == strips - 1) & (tile == tiles - 1)))
        def _():
            tile_copy(lax.select(tile == tiles - 1, 0, tile + 1)).start()

    def rows(member):
        return turned[pl.ds(pl.multiple_of(source[step * group + member] * bk, bk), bk)]

    def add(at, operand):
        product = jnp.dot(operand, dy_ref[...], preferred_element_type=jnp.float32)
        sums[local, at] = jnp.where(tile == 0, 0.0, sums[local, at]) + product

    @pl.when(n == group)
    def _():
        add(slice(None), jnp.concatenate([rows(member) for member in range(group)]))

    @pl.when(n < group)
    def _():
        def one(member, _):
            add(pl.ds(pl.multiple_of(member * bk, bk), bk), rows(member))

        lax.fori_loop(0, n, one, None)

    def block_copy(at, member):
        buffer = lax.rem(at, 2)
        to = values_hbm.at[slot[at * group + member]]
        return pltpu.make_async_copy(leaving.at[buffer, member], to, left.at[buffer])

    def wait(at):
        each(count[at], group, lambda member: block_copy(at, member).wait())

    @pl.when(tile == tiles - 1)
    def _():
        pl.when(local > 1)(lambda: wait(step - 2))
        blocks = sums[local].reshape(group, bk, bn).astype(leaving.dtype)
        leaving[lax.rem(step, 2)] = blocks
        each(n, group, lambda member: block_copy(step, member).start())

        @pl.when(local == strip - 1)
        def _():
            if strip > 1:
                wait(step - 1)
            wait(step)


def gradient(
    x: jax.Array,
    dy: jax.Array,
    topology: Topology,
    block: tuple[int, int],
    *,
    config: Config | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Gradient [S, bk, bn] of values stored as blocks, for y = x @ W, from x [M, K], dy [M, N]."""

    @jax.custom_batching.custom_vmap
    def run(x: jax.Array, dy: jax.Array, topology: Topology) -> jax.Array:
        return _gradient(x, dy, topology, block, config, interpret)

    @run.def_vmap
    def _(size: int, batched: Any, *operands: Any):
        return in_turn(run, batched, *operands), True

    return run(x, dy, topology)


def _gradient(
    x: jax.Array,
    dy: jax.Array,
    topology: Topology,
    block: tuple[int, int],
    config: Config | None,
    interpret: Any,
) -> jax.Array:
    device = tpu()
    (m, k), (bk, bn) = x.shape, block
    chosen = config or choose_config(
        m, k, topology.grid[1], (bk, bn), topology.slots, x.dtype, device, gradient=True
    )
    bm, group, cores, strip = chosen.bm, chosen.group, chosen.cores, chosen.strip
    lists = prefetched(topology, group, cores * strip, transpose=False)
    strips = -(-lists.steps // (cores * strip))
    x, dy = padded(x, bm), padded(dy, bm)
    size, reads = topology.slots * bk * bn, lists.out.shape[0] // (cores * strip) * cores

    def dy_block(core, part, tile, local, slot, source, out, *_):
        return tile, out[(part * cores + core) * strip + local]

    return pl.pallas_call(
        _gradient_kernel,
        out_shape=result_like(x, (topology.slots, bk, bn)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(cores, strips, x.shape[0] // bm, strip),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec((bm, bn), dy_block)],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((bm, k), x.dtype),
                pltpu.VMEM((k, bm), x.dtype),
                pltpu.VMEM((strip, group * bk, bn), jnp.float32),
                pltpu.VMEM((2, group, bk, bn), x.dtype),
                pltpu.VMEM((bk, bn), x.dtype),
                pltpu.SemaphoreType.DMA((1,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((1,)),
            ],
        ),
        compiler_params=compiler_params(device, 4),
        cost_estimate=cost(x.shape[0], size, reads * x.nbytes + dy.nbytes + size * x.itemsize),
        interpret=interpret,
        name="block_sparse_gradient",
    )(*lists[:4], topology.by_col, topology.count[None], x, dy)
