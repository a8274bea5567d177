"""Block-sparse matmul on TPU: x @ W and x @ W^T with x resident in VMEM.

A panel of bm rows of x stays in VMEM while the grid walks the stored blocks in the order of
`visits`, `group` blocks of one output block a step: grid (cores, panels, steps), with as many steps
as the topology needs. Blocks come by hand-made DMA from any slot, one step ahead, and so does the
next panel. dW: `_block_sparse_gradient_tpu.py`; tiles and lists: `_block_sparse_tpu.py`.

FLOPs 2 M bk bn a stored block. Bytes: x and y once, the stored blocks once a panel, so that a block
in bfloat16 gives bm FLOPs a byte; the ridges of v5e, v5p, v6e and TPU7x are 240, 187, 561 and 312.

Entries of a step that hold no block are skipped, neither fetched nor multiplied: a step of fewer
than `group` blocks loops over them. A zero block for them to read would cost a copy of all values
and the products, and would turn infinities in x into NaN.

VMEM: see `product_bytes`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._block_sparse_gradient_tpu import gradient
from pallas_kernels._block_sparse_tpu import (
    Config,
    choose_config,
    compiler_params,
    each,
    in_turn,
    padded,
    prefetched,
    supports,
)
from pallas_kernels._compat import tpu
from pallas_kernels._topology import Topology


def _product_kernel(
    slot,  # SMEM [steps * group]
    source,  # SMEM [steps * group]
    out,  # SMEM [steps]
    count,  # SMEM [steps]
    x_hbm,  # HBM [M, depth]
    values_hbm,  # HBM [S, bk, bn]
    y_ref,  # VMEM [bm, outer]
    panels,  # VMEM [2, bm, depth]
    blocks,  # VMEM [2, group, bk, bn]
    sums,  # VMEM [bm, outer] float32
    panel_here,  # DMA semaphores [2]
    blocks_here,  # DMA semaphores [2]
    *,
    transpose: bool,
    merge: bool,
):
    core, panel, step = (pl.program_id(axis) for axis in range(3))
    panels_here, steps = pl.num_programs(1), pl.num_programs(2)
    bm = panels.shape[1]
    _, group, bk, bn = blocks.shape
    inner = bn if transpose else bk
    last_step, last_panel = step == steps - 1, panel == panels_here - 1
    use, resident = lax.rem(panel * steps + step, 2), lax.rem(panel, 2)

    def panel_copy(index):
        rows = pl.ds(pl.multiple_of((core * panels_here + index) * bm, bm), bm)
        to = lax.rem(index, 2)
        return pltpu.make_async_copy(x_hbm.at[rows], panels.at[to], panel_here.at[to])

    def fetch(at, to):
        def start(member):
            block = values_hbm.at[slot[at * group + member]]
            pltpu.make_async_copy(block, blocks.at[to, member], blocks_here.at[to]).start()

        each(count[at], group, start)

    @pl.when((panel == 0) & (step == 0))
    def _():
        panel_copy(0).start()
        fetch(0, 0)

    @pl.when(step == 0)
    def _():
        panel_copy(panel).wait()

    @pl.when((step == 0) & ~last_panel)
    def _():
        panel_copy(panel + 1).start()

    @pl.when(~(last_step & last_panel))
    def _():
        fetch(lax.select(last_step, 0, step + 1), 1 - use)

    here, n = out[step], count[step]
    first = (step == 0) | (out[jnp.maximum(step - 1, 0)] != here)
    contracted = 1 if transpose else 0

    def columns(member):
        begin = pl.multiple_of(source[step * group + member] * inner, inner)
        return panels[resident, :, pl.ds(begin, inner)]

    def multiply(a, b):
        dims = (((1,), (contracted,)), ((), ()))
        return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)

    # Copies end in any order, so none is here before all are. A full group takes one wait.
    @pl.when(n == group)
    def _():
        pltpu.make_async_copy(blocks.at[use], blocks.at[use], blocks_here.at[use]).wait()
        total = jnp.where(first, 0.0, sums[...])
        if merge:
            wide = jnp.concatenate([columns(member) for member in range(group)], 1)
            deep = jnp.concatenate([blocks[use, member] for member in range(group)], contracted)
            total += multiply(wide, deep)
        else:
            for member in range(group):
                total += multiply(columns(member), blocks[use, member])
        sums[...] = total

    @pl.when(n < group)
    def _():
        @pl.when(first)
        def _():
            sums[...] = jnp.zeros_like(sums)

        def wait(member, _):
            block = blocks.at[use, member]
            pltpu.make_async_copy(block, block, blocks_here.at[use]).wait()

        def add(member, _):
            sums[...] += multiply(columns(member), blocks[use, member])

        lax.fori_loop(0, n, wait, None)
        lax.fori_loop(0, n, add, None)

    @pl.when(last_step | (out[jnp.minimum(step + 1, steps - 1)] != here))
    def _():
        y_ref[...] = sums[...].astype(y_ref.dtype)


def _check(values: jax.Array) -> None:
    reason = supports(values.dtype, *values.shape[1:])
    if reason:
        raise NotImplementedError(f"block_sparse_matmul: {reason}. Take implementation='xla'.")


def matmul(
    x: jax.Array,
    values: jax.Array,
    topology: Topology,
    transpose: bool,
    *,
    config: Config | None = None,
    interpret: Any = False,
) -> jax.Array:
    """X @ W, or x @ W^T with `transpose`; see `block_sparse_matmul`."""
    _check(values)

    @jax.custom_batching.custom_vmap
    def run(x: jax.Array, values: jax.Array, topology: Topology) -> jax.Array:
        return _product(x, values, topology, transpose, config, interpret)

    @run.def_vmap
    def _(size: int, batched: Any, x: jax.Array, values: jax.Array, topology: Topology):
        if any(jax.tree.leaves(batched[1:])):
            return in_turn(run, batched, x, values, topology), True
        y = run(x.reshape(-1, x.shape[-1]), values, topology)  # one weight: more rows
        return y.reshape(*x.shape[:2], -1), True

    return run(x, values, topology)


def _product(
    x: jax.Array,
    values: jax.Array,
    topology: Topology,
    transpose: bool,
    config: Config | None,
    interpret: Any,
) -> jax.Array:
    device = tpu()
    (m, depth), (_, bk, bn) = x.shape, values.shape
    inner, outer = (bn, bk) if transpose else (bk, bn)
    outs = topology.grid[0 if transpose else 1]
    chosen = config or choose_config(
        m, depth, outs, (inner, outer), topology.slots, x.dtype, device
    )
    bm, group, cores = chosen.bm, chosen.group, chosen.cores
    lists = prefetched(topology, group, 1, transpose=transpose)
    x = padded(x, bm * cores)
    panels = x.shape[0] // (bm * cores)

    def y_block(core, panel, step, slot, source, out, count):
        return core * panels + panel, out[step]

    y = pl.pallas_call(
        partial(_product_kernel, transpose=transpose, merge=chosen.merge),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], outs * outer), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(cores, panels, lists.steps),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            out_specs=pl.BlockSpec((bm, outer), y_block),
            scratch_shapes=[
                pltpu.VMEM((2, bm, depth), x.dtype),
                pltpu.VMEM((2, group, bk, bn), values.dtype),
                pltpu.VMEM((bm, outer), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=compiler_params(device, 3),
        interpret=interpret,
        name="block_sparse_matmul",
    )(*lists[:4], x, values)
    return y[:m]


def gradients(
    x: jax.Array,
    dy: jax.Array,
    values: jax.Array,
    topology: Topology,
    *,
    config: Config | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of x [M, K] and of the values, for y = x @ W, from dy [M, N].

    `config` is of the second; the first is a product, see `matmul`.
    """
    dx = matmul(dy, values, topology, True, interpret=interpret)
    _, bk, bn = values.shape
    return dx, gradient(x, dy, topology, (bk, bn), config=config, interpret=interpret)
