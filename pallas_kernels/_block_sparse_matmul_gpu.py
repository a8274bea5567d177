"""Block-sparse matmul on Hopper: x @ W and x @ W^T with wgmma, TMA and warp specialisation.

A tile of y is 2 * rows rows of x times `cols` columns of an output block: the stored blocks of that
line are fetched in turn, from any slot, 64 contracted elements a step, with the columns of x that
they meet. Tiles go panel by panel: a panel of x that fits L2 meets all lines. CTAs take tiles in
turn, lines of most stored blocks first, so that they end at about the same time. A line without
blocks writes zeros.

dW: `_block_sparse_gradient_gpu.py`; ring and tiles: `_block_sparse_gpu.py`.

FLOPs 2 M bk bn a stored block. Bytes into shared memory: a step moves 2 * rows + cols lines of 128
bytes for 2 * rows * cols * 64 products, 85 FLOPs a byte for tiles of 256 x 128 or 128 x 256.
Shared memory: see `shared_bytes`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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
    check,
    choose_config,
    divide,
    launch,
    padded,
    run,
    stacked,
    store,
    supports,
    tiled,
)
from pallas_kernels._block_sparse_gradient_gpu import gradient
from pallas_kernels._compat import gpu_row, runs_in_gpu_kernel
from pallas_kernels._topology import Topology

__all__ = ["gradient", "gradients", "matmul", "supports"]
PANEL_BYTES = 16 * 2**20  # of x, a third of L2


class Lines(NamedTuple):
    """Output blocks of B weights, most stored blocks first within each weight.

    Attributes:
        out: int32 `[B * outs]`, output block within its weight.
        begin: int32 `[B * outs]`, its first entry.
        end: int32 `[B * outs]`, the entry after its last.
        slot: int32 `[B * S]`, slot of each entry, counted over all weights.
        source: int32 `[B * S]`, block index of each entry along the contracted axis.
    """

    out: jax.Array
    begin: jax.Array
    end: jax.Array
    slot: jax.Array
    source: jax.Array


def lines(topology: Topology, transpose: bool) -> Lines:
    """The lines of a topology with one leading axis."""
    start, order, source = (
        (topology.row_start, topology.by_row, topology.cols)
        if transpose
        else (topology.col_start, topology.by_col, topology.rows)
    )
    slots = order.shape[1]
    first = jnp.arange(order.shape[0], dtype=jnp.int32)[:, None] * slots
    out = jnp.argsort(start[:, :-1] - start[:, 1:], axis=1, stable=True).astype(jnp.int32)
    begin = jnp.take_along_axis(start, out, 1) + first
    end = jnp.take_along_axis(start, out + 1, 1) + first
    source = jnp.take_along_axis(source, order, 1)
    return Lines(*(a.reshape(-1) for a in (out, begin, end, order + first, source)))


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Static sizes of a product."""

    batch: int
    tiles: int  # of rows, for each weight
    panel: int  # tiles of a panel
    outs: int
    parts: int  # tiles of an output block
    outer: int
    steps: int  # of a stored block
    transpose: bool
    config: Config

    @property
    def items(self) -> int:
        return self.batch * self.tiles * self.outs * self.parts

    def place(self, item: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Weight; tile of rows; line, counted over all weights; part of the output block."""
        weight, item = divide(item, self.tiles * self.outs * self.parts)
        panel, item = divide(item, self.panel * self.outs * self.parts)
        width = jnp.minimum(self.panel, self.tiles - panel * self.panel)
        line, tile = divide(item, width)
        line, part = divide(line, self.parts)
        return weight, panel * self.panel + tile, weight * self.outs + line, part


def _product_kernel(
    out,  # int32 [B * outs], this and the next four as in `Lines`
    begin,
    end,
    slot,
    source,
    x,  # [B, M, depth]
    values,  # [B * S, bk, bn]
    *refs,
    shape: _Shape,
    biased: bool,
    activation: Any,
):
    bias = refs[0] if biased else None  # float32 [B * outs * outer]
    y, x_ring, w_ring, chunks, full, empty = refs[biased:]  # y [B, M, outs * outer]
    config, ring = shape.config, Ring(full, empty, shape.config.stages)
    rows, cols, transpose = config.rows, config.cols, shape.transpose

    def fetch(item, step):
        weight, tile, line, part = shape.place(item)
        tokens = pl.ds(tile * GROUPS * rows, GROUPS * rows)
        outer = pl.ds(part * cols, cols)

        def block(entry, step):
            at_slot, at_source = slot[entry], source[entry]

            def one(i, to, barrier):
                contracted = pl.ds(at_source * shape.steps * DEPTH + i * DEPTH, DEPTH)
                inner = pl.ds(i * DEPTH, DEPTH)
                w = values.at[(at_slot, outer, inner) if transpose else (at_slot, inner, outer)]
                plgpu.copy_gmem_to_smem(x.at[weight, tokens, contracted], x_ring.at[to], barrier)
                plgpu.copy_gmem_to_smem(w, w_ring.at[to], barrier)

            for i in range(shape.steps):
                ring.fill(step + i, partial(one, i))
            return step + shape.steps

        return lax.fori_loop(begin[line], end[line], block, step)

    def compute(group, item, step):
        weight, tile, line, part = shape.place(item)
        steps = (end[line] - begin[line]) * shape.steps
        row = pl.ds((tile * GROUPS + group) * rows, rows)
        col = out[line] * shape.outer + part * cols

        def finish(sums, at):
            if bias is not None:
                first = weight * (shape.outs * shape.outer) + col + at
                row = gpu_row(bias.at[pl.ds(first, sums.shape[1])])
                sums += lax.broadcast_in_dim(row, sums.shape, (1,))
            return sums if activation is None else activation(sums)

        def accumulate(sums):
            def product(at):
                w = w_ring.at[at]
                w = w.transpose((1, 0)) if transpose else w
                plgpu.wgmma(sums, x_ring.at[at, pl.ds(group * rows, rows)], w)

            ring.multiply(step, steps, product)
            return sums[...]

        total = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((rows, cols), jnp.float32))
        store(total, y.at[weight, row, pl.ds(col, cols)], chunks.at[group], finish)
        return step + steps

    run(ring, shape.items, config.sms, fetch, compute)


@partial(jax.jit, static_argnames=("transpose", "activation", "config", "interpret"))
def matmul(
    x: jax.Array,
    values: jax.Array,
    topology: Topology,
    transpose: bool,
    *,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    config: Config | None = None,
    interpret: Any = None,
) -> jax.Array:
    """X @ W, or x @ W^T with `transpose`; see `block_sparse_matmul`.

    `bias` [N] and `activation`, a function of entries, are applied to the float32 sums, in the
    kernel if Mosaic GPU has all operations of the activation.
    """
    check(values)
    function = partial(
        _product, transpose=transpose, activation=activation, config=config, interpret=interpret
    )
    operands = jax.tree.map(lambda leaf: leaf[None], (x, values, topology, bias))
    return stacked(function, *operands, more_rows=True)[0]


def gradients(
    x: jax.Array,
    dy: jax.Array,
    values: jax.Array,
    topology: Topology,
    *,
    config: Config | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of x [M, K] and of the values, for y = x @ W, from dy [M, N].

    `config` is of the second; the first is a product, see `matmul`.
    """
    dx = matmul(dy, values, topology, True, interpret=interpret)
    _, bk, bn = values.shape
    return dx, gradient(x, dy, topology, (bk, bn), config=config, interpret=interpret)


def _product(
    x: jax.Array,  # [B, M, depth]
    values: jax.Array,  # [B, S, bk, bn]
    topology: Topology,
    bias: jax.Array | None,
    *,
    transpose: bool,
    activation: Any,
    config: Config | None,
    interpret: Any,
) -> jax.Array:
    (batch, m, depth), (bk, bn) = x.shape, values.shape[-2:]
    inner, outer = (bn, bk) if transpose else (bk, bn)
    outs, dtype = topology.grid[0 if transpose else 1], values.dtype
    config = config or choose_config(m, batch, outs, outer)
    bm, cols, stages = GROUPS * config.rows, config.cols, config.stages
    x = padded(x)
    tiles = -(-x.shape[1] // bm)
    shape = _Shape(
        batch=batch,
        tiles=tiles,
        panel=max(1, min(tiles, PANEL_BYTES // (bm * depth * 2))),
        outs=outs,
        parts=outer // cols,
        outer=outer,
        steps=inner // DEPTH,
        transpose=transpose,
        config=config,
    )
    w_tile = (cols, DEPTH) if transpose else (DEPTH, cols)
    fused = activation is None or runs_in_gpu_kernel(activation)
    biases = [] if bias is None else [bias.astype(jnp.float32).reshape(-1)]
    out = jax.ShapeDtypeStruct((*x.shape[:2], outs * outer), dtype if fused else jnp.float32)
    y = launch(
        partial(
            _product_kernel,
            shape=shape,
            biased=bias is not None,
            activation=activation if fused else None,
        ),
        "block_sparse_matmul",
        config,
        out,
        [
            plgpu.SMEM((stages, bm, DEPTH), dtype, transforms=tiled(DEPTH, dtype)),
            plgpu.SMEM((stages, *w_tile), dtype, transforms=tiled(w_tile[1], dtype)),
        ],
        2,
        interpret,
        [*lines(topology, transpose), x, values.reshape(-1, bk, bn), *biases],
    )
    y = y[:, :m]
    return y if activation is None or fused else activation(y).astype(dtype)
