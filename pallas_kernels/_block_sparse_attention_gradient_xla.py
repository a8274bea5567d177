"""Gradients of block-sparse attention and of block mass in plain JAX: one pass over the blocks.

By key block, so dK and dV are complete at the end of a line, and dQ is added up in place. Tiles are
transposed, [bkv, bq * G]: then of the five products only dQ needs one, of dS.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels._attention_plan import Extras, Form, of_entries, to_map
from pallas_kernels._block_lists import BlockLists
from pallas_kernels._block_sparse_attention_xla import (
    by_token,
    dot_rows,
    each_entry,
    hidden,
    in_heads,
    in_rows,
    line,
    of_entry,
    put,
    put_entry,
    put_rows,
    rows_of,
    tile_of,
    tokens,
    zeros_of,
)
from pallas_kernels._op import sum_type


def backward(form: Form, q, k, v, lse, dout, delta, rows: BlockLists, cols: BlockLists, extras):
    """Gradients of q, k [B, H_kv, S, D], v and bias (or None), from dout and delta [B, A, G, T].

    delta is the sum of out * dout over D, less the gradient of lse.
    """
    dq, dk, dv, _, dbias = _gradients(form, q, k, lse, (v, dout, delta), None, rows, cols, extras)
    return dq, dk, dv, dbias


def mass_backward(form: Form, q, k, lse, dmass, rows: BlockLists, cols: BlockLists, extras: Extras):
    """Gradients of q, k, lse and bias (or None) from dmass [B, A, G, R, W]."""
    by_map = to_map(dmass, rows, cols.index.shape[2])
    dmass = of_entries(by_map.swapaxes(-1, -2), cols)
    dq, dk, _, dlse, dbias = _gradients(form, q, k, lse, None, dmass, rows, cols, extras)
    return dq, dk, dlse, dbias


def _gradients(form: Form, q, k, lse, values, dmass, rows, cols, extras):
    """dq, dk, dv, dlse and dbias; of dv and dlse that which is asked for, else None.

    p = exp(s - lse); ds = p (dp - delta), where dp = do v^T for `values` = (v, dout, delta), or
    ds = p dmass of the entry.
    """
    shape, (b, units, g, _, d) = q.shape, q.shape
    bq, bkv = form.block_size
    wide = sum_type(q.dtype)
    zeros = zeros_of(cols, q, k, lse, values, dmass, extras)
    q, k, lse = by_token(q), k.swapaxes(1, 2), hidden(form, lse)
    v: Any = None
    dout: Any = None
    delta: Any = None
    if values is not None:
        v, dout, delta = values[0].swapaxes(1, 2), by_token(values[1]), in_rows(values[2])
    blocks, shared = k.shape[1] // bkv, units > k.shape[2]

    def col(number, results):
        at = line(number, units, blocks)
        keys = tokens(k, at, bkv, units)
        key_values: Any = None if v is None else tokens(v, at, bkv, units)

        def add(step, i, kind, carry):
            dq, dlse, dbias, dk, dv = carry
            spot = at._replace(block=i)
            queries = tokens(q, spot, bq, units)
            bias = None if extras.key_bias is None else of_entry(extras.key_bias, at, step)
            scores, slope = tile_of(
                form,
                dot_rows(keys, queries, wide),
                i,
                at.block,
                extras,
                at,
                bias,
                kind,
                transposed=True,
            )
            weights = jnp.exp(scores - rows_of(lse, spot, bq * g))
            if values is not None:
                douts = tokens(dout, spot, bq, units)
                dv += jnp.dot(weights.astype(douts.dtype), douts, preferred_element_type=wide)
                dweights = dot_rows(key_values, douts, wide) - rows_of(delta, spot, bq * g)
            else:
                dweights = jnp.tile(of_entry(dmass, at, step), bq)
            dscores = weights * dweights
            if values is None:
                dlse = put_rows(dlse, rows_of(dlse, spot, bq * g) - dscores.sum(0), spot)
            if dbias is not None:
                totals = dscores.sum(0).reshape(bq, g).sum(0)
                dbias = put_entry(dbias, totals, at, step)
            if slope is not None:
                dscores = dscores * (1 - slope * slope)
            dscores = (dscores * form.scale).astype(q.dtype)
            dk += jnp.dot(dscores, queries, preferred_element_type=wide)
            # Else XLA folds the transpose into the product, which is then slow.
            by_query = lax.optimization_barrier(dscores.T)
            tile = jnp.dot(by_query, keys, preferred_element_type=wide)
            return put(dq, tile, spot, bq, units, add=True), dlse, dbias, dk, dv

        *sums, dks, dvs = results
        start = jnp.broadcast_to(zeros[0].astype(wide), (bkv, d))
        start = (*sums, start, None if v is None else start)
        *sums, dk, dv = each_entry(form, extras, cols, at, units, add, start)
        dks = put(dks, dk, at, bkv, units, add=shared)
        dvs = None if v is None else put(dvs, dv, at, bkv, units, add=shared)
        return *sums, dks, dvs

    def full(shape, zero, dtype=wide):
        return jnp.broadcast_to(zero.astype(dtype), shape)

    kind = wide if shared else k.dtype
    start = (
        full(q.shape, zeros[0]),
        full(lse.shape, zeros[0]) if values is None else None,
        None if extras.bias is None else full((b, units, g, *cols.index.shape[2:]), zeros[0]),
        full(k.shape, zeros[1], kind),
        None if v is None else full(k.shape, zeros[2], kind),
    )
    dq, dlse, dbias, dk, dv = lax.fori_loop(0, b * units * blocks, col, start)
    dq = dq.astype(q.dtype).swapaxes(1, 2).reshape(shape)
    dk, dv = (None if x is None else x.astype(k.dtype).swapaxes(1, 2) for x in (dk, dv))
    if dlse is not None:
        dlse = in_heads(dlse, g)
    if dbias is not None:
        by_map = to_map(dbias, cols, rows.index.shape[2])
        dbias = of_entries(by_map.swapaxes(-1, -2), rows)
    return dq, dk, dv, dlse, dbias
