"""Block-sparse attention on Hopper: the forward pass with wgmma, TMA and warp specialisation.

A CTA takes the list of one block of queries: two warpgroups hold 64 queries each, the halves of a
block of 128, or for blocks of 64 two heads of a unit, or else two blocks with lists of their own. A
step is 64 or 128 keys of a listed block: s = q k^T, an online softmax in base 2, o += p v, with p
in registers. Full blocks come first, and only the loop over partial ones looks at tokens. While one
warpgroup multiplies, the other does its softmax (two lists of different lengths go unordered).
A list without blocks gives zeros, and an lse of -inf.

dQ, dK and dV: `_block_sparse_attention_backward_gpu.py`; what they share: `_attention_gpu.py`.

FLOPs 4 bq bkv D a listed block and head: the floor is that over 989 TFLOP/s. Bytes: a step reads
4 D bytes a key from L2, which 128 queries share, 128 FLOPs a byte (64 where lists differ); lists of
one head run side by side. Beside the products a score costs one exp2, of which an SM does 16 a
cycle against 4096 FLOPs: at D = 64 they take as long as the products, at D = 128 half as long. Not
timed on a device yet: compiled for sm_90a, where nothing spills, and interpreted.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._attention_gpu import (
    LEAST,
    LOG2E,
    Ring,
    add_product,
    by_warpgroup,
    fetch,
    hidden_out,
    launch,
    loops,
    multiplier,
    nought,
    product,
    raw_scores,
    tile,
)
from pallas_kernels._attention_plan import Extras, Form
from pallas_kernels._attention_walk_gpu import (
    GROUPS,
    ROWS,
    Config,
    Operands,
    Shape,
    alike,
    fitted,
    problem,
    row_config,
    step_of,
    supports,
    walk,
)
from pallas_kernels._block_lists import BlockLists
from pallas_kernels._block_sparse_attention_backward_gpu import backward

__all__ = ["backward", "forward", "supports"]


def choose_config(block_size: tuple[int, int], g: int, d: int) -> Config:
    """The tiles of the forward pass for G heads of a unit, D wide."""
    config = row_config(block_size, g)
    small = d == 256 or config.lines == 2  # of the sums, or of two rings, a tile must be small
    config = dataclasses.replace(config, tile=ROWS if small else block_size[1])
    return fitted(config, d, 1, 1, 0)  # q, which the output leaves through, and lse


def _kernel(
    item,
    given: tuple[Operands, Any, Any, Any],  # q [B A G T, D], k and v [B H_kv S, D]
    out,  # [B A G T, D]
    lse,  # float32 [B A G T]
    q_tile,
    k_ring,
    v_ring,
    lse_tile,
    q_full,
    k_full,
    k_empty,
    v_full,
    v_empty,
    turns,
    *,
    shape: Shape,
):
    operands, q, k, v = given
    form, config = shape.form, shape.config
    k_steps = Ring((k_ring,), k_full, k_empty, config)
    v_steps = Ring((v_ring,), v_full, v_empty, config)

    def compute(group):
        mine = walk(shape, operands, item, group)
        rows = pl.ds(mine.head * shape.t + mine.first, ROWS)
        my_q = q_tile.at[group]
        k_steps.open(mine.number)
        v_steps.open(mine.number)
        plgpu.copy_gmem_to_smem(q.at[rows], my_q, q_full.at[group])
        plgpu.barrier_wait(q_full.at[group])
        c = multiplier(form)
        in_turn = config.lines == 1

        def turn():
            """Wait until the other warpgroup is at its next turn as well."""
            if in_turn:
                plgpu.barrier_arrive(turns)
                plgpu.barrier_wait(turns)

        def step(i, carry, masked):
            sums, high, total = carry
            at = step_of(shape, operands, mine, i)
            bias = 0.0 if operands.bias is None else operands.bias[at.bias] * LOG2E
            (my_k,) = k_steps.wait(mine.number, i)
            own = q_tile.at[group + nought(i) if shape.d == 256 else group]
            products = product((ROWS, config.tile), own, my_k.transpose((1, 0)), turn)
            k_steps.release(mine.number, i)
            raw = raw_scores(form, products)
            if masked:
                raw = hidden_out(shape, operands, raw, mine, at)
            higher = jnp.maximum(high, raw.max(1) * c + bias)
            weights = jnp.exp2(raw * c - lax.broadcast_in_dim(higher - bias, raw.shape, (0,)))
            shrink = jnp.exp2(high - higher)
            total = total * shrink + weights.sum(1)
            sums *= lax.broadcast_in_dim(shrink, sums.shape, (0,))
            weights = weights.astype(v.dtype)
            turn()
            (my_v,) = v_steps.wait(mine.number, i)
            sums = add_product(sums, weights, my_v, shape.interpreted)
            v_steps.release(mine.number, i)
            return sums, higher, total

        carry = (
            jnp.zeros((ROWS, shape.d), jnp.float32),
            jnp.full((ROWS,), LEAST, jnp.float32),
            jnp.zeros((ROWS,), jnp.float32),
        )
        pl.when(group == 1)(turn)  # so that it is half a step behind
        sums, high, total = loops(shape, mine, step, carry)
        pl.when(group == 0)(turn)

        seen = total > 0
        total = jnp.where(seen, total, 1.0)
        my_q[...] = (sums / lax.broadcast_in_dim(total, sums.shape, (0,))).astype(out.dtype)
        my_lse = lse_tile.at[group]
        my_lse[...] = jnp.where(seen, high * math.log(2) + jnp.log(total), -jnp.inf)
        plgpu.commit_smem()

        @pl.when(mine.live)
        def _():
            plgpu.copy_smem_to_gmem(my_q, out.at[rows])
            plgpu.copy_smem_to_gmem(my_lse, lse.at[rows])

        plgpu.wait_smem_to_gmem(0)

    rings = [(k_steps, (k,)), (v_steps, (v,))]
    by_warpgroup(partial(fetch, shape, operands, item, rings), compute)


@partial(jax.jit, static_argnames=("form", "config", "interpret"))
def forward(
    form: Form,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: BlockLists,
    extras: Extras,
    *,
    config: Config | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention: out [B, A, G, T, D] and lse [B, A, G, T], -inf where a query saw no key."""
    b, a, g, t, d = q.shape
    config = config or choose_config(form.block_size, g, d)
    k, v = alike(k, v)
    shape, operands = problem(form, config, q, k, rows, extras, by_key=False, interpret=interpret)
    ring = config.lines * config.stages
    barriers = [
        plgpu.Barrier(num_barriers=ring),
        plgpu.Barrier(num_arrivals=GROUPS // config.lines, num_barriers=ring),
    ]
    out, lse = launch(
        partial(_kernel, shape=shape),
        "block_sparse_attention",
        shape.items,
        (operands, *(x.reshape(-1, d) for x in (q, k, v))),
        (
            jax.ShapeDtypeStruct((b * a * g * t, d), q.dtype),
            jax.ShapeDtypeStruct((b * a * g * t,), jnp.float32),
        ),
        [
            tile(GROUPS, ROWS, d, q.dtype),
            tile(ring, config.tile, d, q.dtype),
            tile(ring, config.tile, d, q.dtype),
            plgpu.SMEM((GROUPS, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=GROUPS),
            *barriers,
            *barriers,
            plgpu.Barrier(num_arrivals=GROUPS),
        ],
        interpret,
    )
    return out.reshape(q.shape), lse.reshape(b, a, g, t)
