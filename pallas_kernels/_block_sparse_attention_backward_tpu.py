"""Gradients of block-sparse attention on TPU: dQ by query, dK and dV by key.

With p = exp(s - lse), dp = dout v^T and ds = p (dp - delta): dq = ds k, dk = ds^T q, dv = p^T dout.
dQ takes a block of queries of a few heads a grid step, as the forward pass does. dK and dV take a
block of keys, and gather tiles of queries with their dout, lse and delta; scores are transposed, so
that queries are lanes, and every product is plain. No two steps write one block: deterministic.

FLOPs a tile: 6 rows keys D for dQ, 8 for dK and dV. Bytes 4 keys D and 4 queries D in bfloat16.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _attention_tpu as shared
from pallas_kernels._attention_launch_tpu import by_list, from_list, launch
from pallas_kernels._attention_plan import Extras, Form
from pallas_kernels._attention_step_tpu import Step
from pallas_kernels._attention_tiles_tpu import plan_cols, plan_rows
from pallas_kernels._attention_tiles_tpu import supports as supports
from pallas_kernels._attention_tpu import LOG2E, MASKED, Plan, head_blocks, tokens
from pallas_kernels._block_lists import BlockLists
from pallas_kernels._block_sparse_attention_tpu import clear, q_of, sums_of_entries
from pallas_kernels._block_sparse_attention_tpu import forward as forward
from pallas_kernels._block_sparse_attention_tpu import mass as mass
from pallas_kernels._compat import tpu


def _dq_kernel(
    step: Step, q_ref: Any, dout_ref: Any, lse_ref: Any, delta_ref: Any, dq_ref: Any, *refs: Any
):
    *dbias_ref, total = refs
    total[...] = jnp.zeros_like(total)
    if dbias_ref:
        clear(dbias_ref[0])
    c = shared.factor(step.form, step.biased)
    lse, delta = (shared.column(ref[...])[:, :1] for ref in (lse_ref, delta_ref))

    def work(parts, listed):
        k, v = listed
        for part in parts:
            scores = shared.product(q_of(q_ref, part), k[part.lanes], 1)
            dweights = shared.product(q_of(dout_ref, part), v[part.lanes], 1)
            scores, slope = step.logits(scores, part)
            weights = jnp.exp2(scores * c - lse[part.rows])
            dscores = weights * (dweights - delta[part.rows])
            if dbias_ref:
                sums_of_entries(step, part, dscores, dbias_ref[0])
            if slope is not None:
                dscores = dscores * (1 - slope * slope)
            total[part.rows] += shared.product(dscores.astype(k.dtype), k[part.lanes], 0)

    step.walk(work)
    dq = total[...] * step.form.scale
    dq_ref[...] = dq.astype(dq_ref.dtype).reshape(dq_ref.shape)


def _dkv_kernel(step: Step, k_ref: Any, v_ref: Any, dk_ref: Any, dv_ref: Any, dk: Any, dv: Any):
    dk[...] = jnp.zeros_like(dk)
    dv[...] = jnp.zeros_like(dv)
    c = shared.factor(step.form, step.biased)

    def work(parts, listed):
        q, dout, stats = listed
        ((_, _, _, tile, _),) = parts
        beyond = [tile.whole or tile.live(member) for member in range(tile.size)]
        lse = shared.side_by_side(
            [
                s[:1] if b is True else jnp.where(b, s[:1], -MASKED)
                for s, b in zip(stats, beyond, strict=True)
            ]
        )
        delta = shared.side_by_side([s[1:] for s in stats])
        scores = shared.product(k_ref[...], q, 1)
        dweights = shared.product(v_ref[...], dout, 1)
        scores, slope = step.logits(scores, parts[0])
        weights = jnp.exp2(scores * c - lse)
        dscores = weights * (dweights - delta)
        if slope is not None:
            dscores = dscores * (1 - slope * slope)
        dv[...] += shared.product(weights.astype(dout.dtype), dout, 0)
        dk[...] += shared.product(dscores.astype(q.dtype), q, 0)

    step.walk(work)
    dk_ref[...] = (dk[...] * step.form.scale).astype(dk_ref.dtype)
    dv_ref[...] = dv[...].astype(dv_ref.dtype)


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
    plans: tuple[Plan, Plan] | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Gradients of q, k [B, H_kv, S, D], v and bias (or None), from dout and delta [B, A, G, T].

    delta is the sum of out * dout over D, less the gradient of lse.
    """
    device = tpu()
    row_plan, col_plan = plans or (
        plan_rows(form, q, k, rows, device, "dq"),
        plan_cols(form, q, k, cols, device),
    )
    # A query that saw no key has weights of 0.
    lse = jnp.where(lse > -jnp.inf, lse * LOG2E, -MASKED)
    dq_, dbias = dq(form, q, k, v, lse, dout, delta, rows, extras, row_plan, interpret)
    dk, dv = dkv(form, q, k, v, lse, dout, delta, cols, extras, col_plan, interpret)
    return dq_, dk, dv, dbias


def dq(form, q, k, v, lse, dout, delta, rows, extras, plan, interpret=False):
    """Gradients of q and bias; lse is in base 2 and finite."""
    q_, dout_ = (tokens(x, plan) for x in (q, dout.astype(q.dtype)))
    k_, v_ = (head_blocks(x, plan.listed) for x in (k, v))
    height, places = plan.heads * plan.own, rows.index.shape[-1]
    stats = [(by_list(x.reshape(*x.shape[:3], -1, plan.own), plan), "list") for x in (lse, delta)]
    biased = extras.bias is not None
    dbias_like = ((plan.total, 1, plan.heads * places), jnp.float32, "scalars")
    pairs = plan.total * height * places * plan.listed
    dq, *dbias = launch(
        _dq_kernel,
        form,
        plan,
        rows,
        extras,
        [(k_, "head"), (v_, "head")],
        [(q_, "tokens"), (dout_, "tokens"), *stats],
        [(q_.shape, q.dtype, "tokens"), *([dbias_like] if biased else [])],
        [pltpu.VMEM((height, q_.shape[-1]), jnp.float32)],
        pl.CostEstimate(
            flops=6 * pairs * q_.shape[-1],
            bytes_accessed=3 * q_.nbytes + 2 * k_.nbytes,
            transcendentals=pairs,
        ),
        "block_sparse_attention_dq",
        interpret,
    )
    dq = dq[..., : q.shape[-1]].reshape(q.shape)
    if not biased:
        return dq, None
    return dq, from_list(dbias[0], plan, (*q.shape[:3], plan.lists, places))


def dkv(form, q, k, v, lse, dout, delta, cols, extras, plan, interpret=False):
    """Gradients of k and v; lse is in base 2 and finite."""
    (b, a, g, t, d), heads = q.shape, k.shape[1]
    blocks = lambda x: tokens(x, plan).reshape(plan.units, plan.heads, -1, plan.listed, width)  # noqa: E731
    k_, v_ = (head_blocks(x, plan.own) for x in (k, v))
    width = k_.shape[-1]
    k_, v_ = (x.reshape(b * heads, -1, width) for x in (k_, v_))
    stats = jnp.stack(
        [
            by_list(x.reshape(b, a, g, -1, plan.listed), _queries(plan, t))[:, 0]
            for x in (lse, delta)
        ],
        1,
    ).reshape(plan.units, -1, 2, plan.heads * plan.listed)
    q_, dout_ = blocks(q), blocks(dout.astype(q.dtype))
    alone = plan.units_per_head == 1
    like = ((plan.units, *k_.shape[1:]), k.dtype if alone else jnp.float32, "unit")
    extras = extras._replace(bias=extras.key_bias)
    pairs = plan.total * plan.own * cols.index.shape[-1] * plan.heads * plan.listed
    found = launch(
        _dkv_kernel,
        form,
        plan,
        cols,
        extras,
        [(q_, "heads"), (dout_, "heads"), (stats, "unit")],
        [(k_, "head"), (v_, "head")],
        [like, like],
        [pltpu.VMEM((plan.own, width), jnp.float32)] * 2,
        pl.CostEstimate(
            flops=8 * pairs * width,
            bytes_accessed=2 * q_.nbytes + 4 * k_.nbytes,
            transcendentals=pairs,
        ),
        "block_sparse_attention_dkv",
        interpret,
    )
    dk, dv = (
        x.reshape(b * heads, plan.units_per_head, *x.shape[1:]).sum(1)[..., :d].reshape(k.shape)
        for x in found
    )
    return dk.astype(k.dtype), dv.astype(v.dtype)


def _queries(plan: Plan, t: int) -> Plan:
    """A plan whose lists are the blocks of queries, for `by_list`."""
    return dataclasses.replace(plan, lists=t // plan.listed)
