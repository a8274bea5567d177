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

from collections.abc import Callable
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
    Lists,
    choose_config,
    compiler_params,
    cost,
    each,
    in_turn,
    padded,
    prefetched,
    supports,
    when,
)
from pallas_kernels._compat import tpu
from pallas_kernels._op import finish, result_like
from pallas_kernels._topology import Topology


def _product_kernel(
    slot,  # SMEM [steps * group]
    source,  # SMEM [steps * group]
    out,  # SMEM [steps]
    count,  # SMEM [steps]
    x_hbm,  # HBM [M, depth]
    *refs,  # see below
    transpose: bool,
    merge: bool,
    weights: int,
    biased: bool,
    activation: Any,
):
    values_hbm = refs[:weights]  # each HBM [S, bk, bn]
    bias_ref = refs[weights] if biased else None  # VMEM [1, outer]
    (
        y_ref,  # VMEM [bm, outer]
        panels,  # VMEM [2, bm, depth]
        blocks,  # VMEM [2, group, bk, bn]
        sums,  # VMEM [bm, outer] float32
        panel_here,  # DMA semaphores [2]
        blocks_here,  # DMA semaphores [2]
        *held,  # VMEM [bm, outer] float32, of a gated product
    ) = refs[weights + biased :]
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
        def start(values, member):
            block = values.at[slot[at * group + member]]
            pltpu.make_async_copy(block, blocks.at[to, member], blocks_here.at[to]).start()

        for which, values in enumerate(values_hbm):
            mine = weights == 1 or lax.rem(out[at], weights) == which
            when(mine, lambda values=values: each(count[at], group, partial(start, values)))

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

    def block(member):
        return blocks[use, member].astype(panels.dtype)

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
            deep = jnp.concatenate([block(member) for member in range(group)], contracted)
            total += multiply(wide, deep)
        else:
            for member in range(group):
                total += multiply(columns(member), block(member))
        sums[...] = total

    @pl.when(n < group)
    def _():
        @pl.when(first)
        def _():
            sums[...] = jnp.zeros_like(sums)

        def wait(member, _):
            here = blocks.at[use, member]
            pltpu.make_async_copy(here, here, blocks_here.at[use]).wait()

        def add(member, _):
            sums[...] += multiply(columns(member), block(member))

        lax.fori_loop(0, n, wait, None)
        lax.fori_loop(0, n, add, None)

    @pl.when(last_step | (out[jnp.minimum(step + 1, steps - 1)] != here))
    def _():
        if weights == 1:
            bias = None if bias_ref is None else bias_ref[...]
            y_ref[...] = finish(sums[...], bias, activation).astype(y_ref.dtype)
            return

        @pl.when(lax.rem(here, weights) == 0)
        def _():
            held[0][...] = activation(sums[...])

        @pl.when(lax.rem(here, weights) == 1)
        def _():
            y_ref[...] = (held[0][...] * sums[...]).astype(y_ref.dtype)


def check(name: str, x: jax.Array, *weights: jax.Array) -> None:
    """Raise NotImplementedError for what `supports` refuses."""
    for values in weights:
        bk, bn = values.shape[-2:]
        reason = supports(x.dtype, bk, bn, values.dtype)
        if reason:
            raise NotImplementedError(f"{name}: {reason}. Take implementation='xla'.")


def stacked(product: Callable[..., jax.Array], x: jax.Array, *weight: Any) -> jax.Array:
    """`product(x, *weight)`, which under vmap over x alone is one product of more rows."""

    @jax.custom_batching.custom_vmap
    def run(x: jax.Array, weight: Any) -> jax.Array:
        return product(x, *weight)

    @run.def_vmap
    def _(size: int, batched: Any, x: jax.Array, weight: Any):
        if any(jax.tree.leaves(batched[1])):
            return in_turn(run, batched, x, weight), True
        y = run(x.reshape(-1, x.shape[-1]), weight)
        return y.reshape(*x.shape[:2], -1), True

    return run(x, weight)


def matmul(
    x: jax.Array,
    values: jax.Array,
    topology: Topology,
    transpose: bool,
    *,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    config: Config | None = None,
    interpret: Any = False,
) -> jax.Array:
    """X @ W, or x @ W^T with `transpose`; see `block_sparse_matmul`."""
    check("block_sparse_matmul", x, values)

    def product(
        x: jax.Array, values: jax.Array, topology: Topology, bias: jax.Array | None
    ) -> jax.Array:
        (m, depth), (_, bk, bn) = x.shape, values.shape
        block = (bn, bk) if transpose else (bk, bn)
        outs = topology.grid[0 if transpose else 1]
        chosen = config or choose_config(m, depth, outs, block, topology.slots, x.dtype, tpu())
        lists = prefetched(topology, chosen.group, 1, transpose=transpose)
        return launch(
            x,
            (values,),
            lists,
            outs,
            chosen,
            transpose=transpose,
            bias=bias,
            activation=activation,
            interpret=interpret,
        )

    return stacked(product, x, values, topology, bias)


def launch(
    x: jax.Array,
    weights: tuple[jax.Array, ...],
    lists: Lists,
    outs: int,
    config: Config,
    *,
    transpose: bool = False,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    interpret: Any,
) -> jax.Array:
    """The product of x [M, depth] with one weight, or the gated product with two.

    Args:
        x: Any number of rows.
        weights: Values of the weight, or of the gate and of the other factor.
        lists: Visits; of two weights, output block c of the gate counts as 2 c, of the other
            as 2 c + 1.
        outs: Output blocks of y.
        config: Tiles.
        transpose: For x @ W^T.
        bias: [N], of a single weight.
        activation: Of the sums of a single weight, or of those of the gate.
        interpret: See `pallas_call`.
    """
    device = tpu()
    (m, depth), (_, bk, bn), dtype = x.shape, weights[0].shape, weights[0].dtype
    outer = bk if transpose else bn
    bm, group, cores = config.bm, config.group, config.cores
    x = padded(x, bm * cores)
    panels = x.shape[0] // (bm * cores)
    biases = [] if bias is None else [bias[None]]
    held = [pltpu.VMEM((bm, outer), jnp.float32)] * (len(weights) - 1)

    def bias_block(core, panel, step, slot, source, out, count):
        return 0, out[step]

    def y_block(core, panel, step, slot, source, out, count):
        line = out[step]
        return core * panels + panel, line if len(weights) == 1 else lax.div(line, len(weights))

    y = pl.pallas_call(
        partial(
            _product_kernel,
            transpose=transpose,
            merge=config.merge,
            weights=len(weights),
            biased=bias is not None,
            activation=activation,
        ),
        out_shape=result_like(x, (x.shape[0], outs * outer)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(cores, panels, lists.steps),
            in_specs=[
                *[pl.BlockSpec(memory_space=pl.ANY)] * (1 + len(weights)),
                *[pl.BlockSpec((1, outer), bias_block) for _ in biases],
            ],
            out_specs=pl.BlockSpec((bm, outer), y_block),
            scratch_shapes=[
                pltpu.VMEM((2, bm, depth), x.dtype),
                pltpu.VMEM((2, group, bk, bn), dtype),
                pltpu.VMEM((bm, outer), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                *held,
            ],
        ),
        compiler_params=compiler_params(device, 3),
        cost_estimate=cost(
            x.shape[0],
            sum(values.size for values in weights),
            x.nbytes
            + panels * cores * sum(values.nbytes for values in weights)
            + x.shape[0] * outs * outer * x.itemsize,
        ),
        interpret=interpret,
        name="block_sparse_matmul" if len(weights) == 1 else "block_sparse_gated",
    )(*lists[:4], x, *weights, *biases)
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
    dvalues = gradient(x, dy, topology, (bk, bn), config=config, interpret=interpret)
    return dx, dvalues.astype(values.dtype)
