"""The gradients of block-sparse attention on Hopper: a kernel for dQ and one for dK and dV.

With scores s, p = exp(s - lse), ds = p (do v^T - delta): dq = scale ds k walks the keys that a
block of queries lists, dv = p^T do and dk = scale ds^T q the queries that list a block of keys, for
all heads of a unit. Scores are computed again in both, so that nothing of the size of the scores is
stored, and every sum is made by one warpgroup in the order of the lists: the same result every
time. Where more units than key-value heads share a head, their dk and dv are added afterwards.

dQ cuts queries as the forward pass does. For dK and dV a warpgroup holds 64 keys and both sums: the
halves of a block of 128, or two blocks of 64 with lists of their own. Sums of heads 256 wide do not
fit, so there both warpgroups take the same 64 keys, one sums dv and the other dk: 5 products
instead of 4.

The gradient of the bias of a block is a sum over all warps, which Mosaic GPU cannot make in two
warpgroups at once: it comes from the XLA form, which is left out where nobody asks for it.

FLOPs 6 bq bkv D a listed block and head for dQ and 8 (10 for heads 256 wide) for dK and dV, so the
floor is 14 bq bkv D / 989 TFLOP/s, where one kernel with atomic sums would need 10. Bytes from L2:
4 D for each key, or query, of a step, which 128 rows share, or 64 where lists differ or heads are
256 wide. Not timed on a device yet: compiled for sm_90a, where nothing spills, and interpreted.
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

from pallas_kernels import _block_sparse_attention_gradient_xla as xla_gradient
from pallas_kernels._attention_gpu import (
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
    walk,
)
from pallas_kernels._block_lists import BlockLists
from pallas_kernels._compat import gpu_row


def choose_config(block_size: tuple[int, int], g: int, d: int) -> Config:
    """The tiles of dQ for G heads of a unit, D wide."""
    config = row_config(block_size, g)
    if d == 64 and config.lines == 1:
        config = dataclasses.replace(config, tile=block_size[1])
    return fitted(config, d, 2, 2, 0)  # q and do, lse and delta


def choose_key_config(block_size: tuple[int, int], d: int) -> Config:
    """The tiles of dK and dV for heads D wide."""
    if d == 256:
        config = Config(ROWS, 1, roles=True)
    elif block_size[1] == 2 * ROWS:
        config = Config(ROWS, 1, parts=2)
    else:
        config = Config(ROWS, 1, lines=2)
    return fitted(config, d, 2, 0, 2)  # k and v; lse with q, delta with do


def _weights(shape: Shape, operands: Operands, products, lows, mine, at, masked):
    """exp(score - lse), and what its gradient times makes that of q k^T / scale.

    Args:
        shape: See `Shape`.
        operands: See `Operands`.
        products: q k^T.
        lows: lse in base 2, spread over the tile.
        mine: The walk.
        at: The step.
        masked: Whether tokens must be looked at.
    """
    raw = raw_scores(shape.form, products)
    shown = hidden_out(shape, operands, raw, mine, at) if masked else raw
    if operands.bias is not None:
        lows -= operands.bias[at.bias] * LOG2E
    weights = jnp.exp2(shown * multiplier(shape.form) - lows)
    slope = weights if shape.form.softcap is None else weights * (1 - raw * raw)
    return weights, slope


def _query_kernel(
    item,
    given: tuple[Any, ...],
    dq,  # [B A G T, D]
    q_tile,
    do_tile,
    lse_tile,
    delta_tile,
    own_full,
    k_ring,
    v_ring,
    k_full,
    k_empty,
    v_full,
    v_empty,
    *,
    shape: Shape,
):
    # q and do [B A G T, D], k and v [B H_kv S, D], lse in base 2 and delta [B A G T].
    operands, q, k, v, do, lse, delta = given
    form, config = shape.form, shape.config
    k_steps = Ring((k_ring,), k_full, k_empty, config)
    v_steps = Ring((v_ring,), v_full, v_empty, config)

    def compute(group):
        mine = walk(shape, operands, item, group)
        rows = pl.ds(mine.head * shape.t + mine.first, ROWS)
        k_steps.open(mine.number)
        v_steps.open(mine.number)
        for source, to in ((q, q_tile), (do, do_tile), (lse, lse_tile), (delta, delta_tile)):
            plgpu.copy_gmem_to_smem(source.at[rows], to.at[group], own_full.at[group])
        plgpu.barrier_wait(own_full.at[group])
        scores = (ROWS, config.tile)
        lses, deltas = gpu_row(lse_tile.at[group], 0), gpu_row(delta_tile.at[group], 0)

        def step(i, sums, masked):
            at = step_of(shape, operands, mine, i)
            own = group + nought(i) if shape.d > 64 else group
            my_q, my_do = q_tile.at[own], do_tile.at[own]
            (my_k,) = k_steps.wait(mine.number, i)
            products = product(scores, my_q, my_k.transpose((1, 0)))
            lows = lax.broadcast_in_dim(lses, scores, (0,))
            _, slope = _weights(shape, operands, products, lows, mine, at, masked)
            (my_v,) = v_steps.wait(mine.number, i)
            dweights = product(scores, my_do, my_v.transpose((1, 0)))
            v_steps.release(mine.number, i)
            dscores = dweights - lax.broadcast_in_dim(deltas, scores, (0,))
            dscores = (slope * dscores).astype(q.dtype)
            sums = add_product(sums, dscores, my_k, shape.interpreted)
            k_steps.release(mine.number, i)
            return sums

        sums = loops(shape, mine, step, jnp.zeros((ROWS, shape.d), jnp.float32))
        my_q = q_tile.at[group]
        my_q[...] = (sums * form.scale).astype(dq.dtype)
        plgpu.commit_smem()
        pl.when(mine.live)(lambda: plgpu.copy_smem_to_gmem(my_q, dq.at[rows]))
        plgpu.wait_smem_to_gmem(0)

    rings = [(k_steps, (k,)), (v_steps, (v,))]
    by_warpgroup(partial(fetch, shape, operands, item, rings), compute)


def _key_kernel(
    item,
    given: tuple[Any, ...],
    dk,  # [B A S, D]
    dv,  # [B A S, D]
    k_tile,
    v_tile,
    own_full,
    q_ring,
    do_ring,
    lse_ring,
    delta_ring,
    q_full,
    q_empty,
    do_full,
    do_empty,
    together,
    *,
    shape: Shape,
):
    operands, q, k, v, do, lse, delta = given  # as in `_query_kernel`
    form, config = shape.form, shape.config
    q_steps = Ring((q_ring, lse_ring), q_full, q_empty, config)
    do_steps = Ring((do_ring, delta_ring), do_full, do_empty, config)

    def compute(group):
        mine = walk(shape, operands, item, group)
        holder = 0 if config.roles else group
        my_k, my_v = k_tile.at[holder], v_tile.at[holder]
        q_steps.open(mine.number)
        do_steps.open(mine.number)
        rows = pl.ds(shape.kv_row(mine.unit) + mine.first, ROWS)

        def copies():
            plgpu.copy_gmem_to_smem(k.at[rows], my_k, own_full.at[holder])
            plgpu.copy_gmem_to_smem(v.at[rows], my_v, own_full.at[holder])

        if config.roles:
            pl.when(group == 0)(copies)
        else:
            copies()
        plgpu.barrier_wait(own_full.at[holder])
        scores = (ROWS, config.tile)

        def across(ref):
            """A line of shared memory, for each row of the scores."""
            line = lax.broadcast_in_dim(gpu_row(ref, 1), scores, (1,))
            if shape.interpreted:  # where a buffer that was read so is not free for TMA before
                plgpu.commit_smem()
            return line

        def step(i, sums, masked):
            at = step_of(shape, operands, mine, i)
            own = holder + nought(i) if shape.d > 64 else holder
            my_k, my_v = k_tile.at[own], v_tile.at[own]
            my_q, lses = q_steps.wait(mine.number, i)
            products = product(scores, my_k, my_q.transpose((1, 0)))
            weights, slope = _weights(shape, operands, products, across(lses), mine, at, masked)
            my_do, deltas = do_steps.wait(mine.number, i)
            sums = dict(sums)
            if "dv" in sums:
                sums["dv"] = add_product(
                    sums["dv"], weights.astype(q.dtype), my_do, shape.interpreted
                )
            if "dk" in sums:
                dweights = product(scores, my_v, my_do.transpose((1, 0)))
                dscores = (slope * (dweights - across(deltas))).astype(q.dtype)
                sums["dk"] = add_product(sums["dk"], dscores, my_q, shape.interpreted)
            do_steps.release(mine.number, i)
            q_steps.release(mine.number, i)
            return sums

        def run(*names):
            zeros = {name: jnp.zeros((ROWS, shape.d), jnp.float32) for name in names}
            sums = loops(shape, mine, step, zeros)
            if config.roles:  # the tiles are read by the other warpgroup as well
                plgpu.barrier_arrive(together)
                plgpu.barrier_wait(together)
            if "dk" in sums:
                my_k[...] = (sums["dk"] * form.scale).astype(dk.dtype)
            if "dv" in sums:
                my_v[...] = sums["dv"].astype(dv.dtype)
            plgpu.commit_smem()
            to = pl.ds(mine.unit * shape.s + mine.first, ROWS)

            @pl.when(mine.live)
            def _():
                if "dk" in sums:
                    plgpu.copy_smem_to_gmem(my_k, dk.at[to])
                if "dv" in sums:
                    plgpu.copy_smem_to_gmem(my_v, dv.at[to])

        if config.roles:
            pl.when(group == 0)(lambda: run("dv"))
            pl.when(group == 1)(lambda: run("dk"))
        else:
            run("dk", "dv")
        plgpu.wait_smem_to_gmem(0)

    rings = [(q_steps, (q, lse)), (do_steps, (do, delta))]
    by_warpgroup(partial(fetch, shape, operands, item, rings), compute)


@partial(jax.jit, static_argnames=("form", "configs", "interpret"))
def backward(
    form: Form,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    delta: jax.Array,
    rows: BlockLists,
    cols: BlockLists,
    extras: Extras,
    *,
    configs: tuple[Config, Config] | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Gradients of q, k [B, H_kv, S, D], v and bias (or None), from dout and delta [B, A, G, T].

    delta is the sum of out * dout over D, less the gradient of lse. `configs` are those of dQ and
    of dK and dV.
    """
    dbias = None
    if extras.bias is not None:
        dbias = xla_gradient.backward(form, q, k, v, lse, dout, delta, rows, cols, extras)[3]
    b, a, g, t, d = q.shape
    (h_kv, s), dtype = k.shape[1:3], q.dtype
    k, v = alike(k, v)
    # A query that sees nothing gets weights exp(-inf).
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E)
    lse, delta = (jnp.broadcast_to(x.astype(jnp.float32), (b, a, g, t)) for x in (lse, delta))
    dout = jnp.broadcast_to(dout, q.shape)
    tokens = [x.reshape(-1, d) for x in (q, k, v, dout)] + [lse.reshape(-1), delta.reshape(-1)]
    configs = configs or (
        choose_config(form.block_size, g, d),
        choose_key_config(form.block_size, d),
    )

    def run(kernel, name, config, lists, by_key, outs, own, extra):
        """A kernel that holds `own` tiles of tokens and as many lines of floats."""
        shape, operands = problem(
            form, config, q, k, lists, extras, by_key=by_key, interpret=interpret
        )
        holders = 1 if config.roles else GROUPS
        ring, readers = config.lines * config.stages, GROUPS // config.lines
        lines = plgpu.SMEM((ring, config.tile) if by_key else (holders, ROWS), jnp.float32)
        copies = 2 if by_key else 1  # of a step
        barriers = [
            plgpu.Barrier(num_arrivals=copies, num_barriers=ring),
            plgpu.Barrier(num_arrivals=readers, num_barriers=ring),
        ]
        return launch(
            partial(kernel, shape=shape),
            name,
            shape.items,
            (operands, *tokens),
            tuple(jax.ShapeDtypeStruct((n, d), dtype) for n in outs),
            [
                *[tile(holders, ROWS, d, dtype)] * 2,
                *([] if by_key else [lines] * 2),
                plgpu.Barrier(num_arrivals=2 if by_key else 4, num_barriers=holders),
                *[tile(ring, config.tile, d, dtype)] * 2,
                *([lines] * 2 if by_key else []),
                *barriers * 2,
                *extra,
            ],
            interpret,
        )

    (dq,) = run(
        _query_kernel,
        "block_sparse_attention_dq",
        configs[0],
        rows,
        False,
        (b * a * g * t,),
        4,
        [],
    )
    dk, dv = run(
        _key_kernel,
        "block_sparse_attention_dkv",
        configs[1],
        cols,
        True,
        (b * a * s,) * 2,
        2,
        [plgpu.Barrier(num_arrivals=2)],
    )

    def of_heads(x):
        x = x.reshape(b, h_kv, a // h_kv, s, d)
        return x[:, :, 0] if a == h_kv else x.astype(jnp.float32).sum(2).astype(dtype)

    return dq.reshape(q.shape), of_heads(dk), of_heads(dv), dbias
