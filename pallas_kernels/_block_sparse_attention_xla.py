"""Block-sparse attention in plain JAX: loops over the listed blocks, with an online softmax.

Trip counts are traced: nothing is padded to the longest list, and memory beyond inputs and outputs
is one tile of scores. The backward pass visits every block once, by key block. All sums are in a
fixed order, hence deterministic.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._attention_plan import Extras, Form, allowed
from pallas_kernels._block_lists import BlockLists
from pallas_kernels._op import sum_type, vary_alike

_MASKED = -1e30  # finite, so that the difference of two masked scores is not NaN


def _units(q):
    """The arrays of every unit, [B A, ...], for `lax.map`; G and the batch are spread out."""
    b, a = q.shape[:2]

    def spread(x, heads_axis=True):
        """[B or 1, heads dividing A, ...] or [B or 1, ...] -> [B A, ...]."""
        if not heads_axis:
            x = x[:, None]
        x = jnp.broadcast_to(jnp.repeat(x, a // x.shape[1], 1), (b, a, *x.shape[2:]))
        return x.reshape(b * a, *x.shape[2:])

    return spread, lambda e: Extras(
        spread(e.offset, False),
        None if e.q_segments is None else spread(e.q_segments, False),
        None if e.k_segments is None else spread(e.k_segments, False),
        None if e.bias is None else spread(e.bias),
        None if e.key_bias is None else spread(e.key_bias),
    )


def _scores(form, q, k, i, j, kind, extras, bias):
    """Scores [G, bq, bkv], masked ones at _MASKED, and tanh of them if capped."""
    (bq, bkv) = form.block_size
    scores = jnp.einsum("gqd,kd->gqk", q, k, preferred_element_type=sum_type(q.dtype))
    scores = scores * form.scale
    slope = None
    if form.softcap is not None:
        slope = jnp.tanh(scores / form.softcap)
        scores = slope * form.softcap
    if bias is not None:
        scores = scores + bias[:, None, None]
    q_at = i * bq + jnp.arange(bq, dtype=jnp.int32)[:, None]
    k_at = j * bkv + jnp.arange(bkv, dtype=jnp.int32)
    segments = ()
    if extras.q_segments is not None:
        segments = (
            lax.dynamic_slice(extras.q_segments, (i * bq,), (bq,))[:, None],
            lax.dynamic_slice(extras.k_segments, (j * bkv,), (bkv,)),
        )
    seen = allowed(form, kind, q_at, k_at, extras.offset, *segments)
    return jnp.where(seen, scores, _MASKED), slope


def forward(form: Form, q, k, v, rows: BlockLists, extras: Extras):
    """Attention: out [B, A, G, T, D] and lse [B, A, G, T], -inf where a query saw no key."""
    b, a, g, t, d = q.shape
    bq, bkv = form.block_size
    wide = sum_type(q.dtype)
    spread, spread_extras = _units(q)

    def unit(inputs):
        q, k, v, rows, extras = inputs
        q = q.reshape(g, -1, bq, d).swapaxes(0, 1)
        k, v = (x.reshape(-1, bkv, d) for x in (k, v))

        def row(i):
            def add(step, carry):
                high, total, out = carry
                j, kind = rows.index[i, step], rows.kind[i, step]
                bias = None if extras.bias is None else extras.bias[:, i, step]
                scores, _ = _scores(form, q[i], k[j], i, j, kind, extras, bias)
                new = jnp.maximum(high, scores.max(-1))
                weights = jnp.where(scores > _MASKED / 2, jnp.exp(scores - new[..., None]), 0)
                shrink = jnp.exp(high - new)
                product = jnp.einsum(
                    "gqk,kd->gqd", weights.astype(v.dtype), v[j], preferred_element_type=wide
                )
                return new, total * shrink + weights.sum(-1), out * shrink[..., None] + product

            start = vary_alike(
                jnp.full((g, bq), _MASKED, wide),
                jnp.zeros((g, bq), wide),
                jnp.zeros((g, bq, d), wide),
                q.ravel()[0],
                k.ravel()[0],
                v.ravel()[0],
                rows.count.ravel()[0],
                *(x.ravel()[0] for x in jax.tree.leaves(extras)),
            )[:3]
            high, total, out = lax.fori_loop(0, rows.count[i], add, start)
            seen = total > 0
            total = jnp.where(seen, total, 1)
            return (out / total[..., None]).astype(q.dtype), jnp.where(
                seen, high + jnp.log(total), -jnp.inf
            )

        out, lse = lax.map(row, jnp.arange(q.shape[0], dtype=jnp.int32))
        return out.swapaxes(0, 1).reshape(g, t, d), lse.swapaxes(0, 1).reshape(g, t)

    lists = BlockLists(*(spread(x) for x in rows))
    units = (q.reshape(b * a, g, t, d), spread(k), spread(v), lists, spread_extras(extras))
    out, lse = lax.map(unit, units)
    return out.reshape(q.shape), lse.reshape(b, a, g, t)


def backward(form: Form, q, k, v, lse, dout, delta, rows: BlockLists, cols: BlockLists, extras):
    """Gradients of q, k [B, H_kv, S, D], v and bias (or None), from dout and delta [B, A, G, T].

    delta is the sum of out * dout over D, less the gradient of lse.
    """
    b, a, g, t, d = q.shape
    bq, bkv = form.block_size
    wide = sum_type(q.dtype)
    spread, spread_extras = _units(q)

    def unit(inputs):
        q, k, v, lse, dout, delta, rows, cols, extras = inputs
        q, dout, lse, delta = (
            x.reshape(g, -1, bq, *x.shape[2:]).swapaxes(0, 1) for x in (q, dout, lse, delta)
        )
        k, v = (x.reshape(-1, bkv, d) for x in (k, v))

        def terms(i, j, kind, bias):
            scores, slope = _scores(form, q[i], k[j], i, j, kind, extras, bias)
            low = jnp.where(lse[i] == -jnp.inf, 0, lse[i])
            weights = jnp.where(scores > _MASKED / 2, jnp.exp(scores - low[..., None]), 0)
            dweights = jnp.einsum("gqd,kd->gqk", dout[i], v[j], preferred_element_type=wide)
            dscores = weights * (dweights - delta[i][..., None])
            dbias = dscores.sum((1, 2))
            if slope is not None:
                dscores = dscores * (1 - slope * slope)
            return weights.astype(q.dtype), (dscores * form.scale).astype(q.dtype), dbias

        def row(i):
            def add(step, carry):
                dq, dbias = carry
                j, kind = rows.index[i, step], rows.kind[i, step]
                bias = None if extras.bias is None else extras.bias[:, i, step]
                _, dscores, total = terms(i, j, kind, bias)
                dq += jnp.einsum("gqk,kd->gqd", dscores, k[j], preferred_element_type=wide)
                return dq, dbias.at[:, step].set(total)

            start = jnp.zeros((g, bq, d), wide), jnp.zeros((g, rows.index.shape[1]), wide)
            start = vary_alike(*start, *(x.ravel()[0] for x in jax.tree.leaves(inputs)))[:2]
            return lax.fori_loop(0, rows.count[i], add, start)

        def col(j):
            def add(step, carry):
                dk, dv = carry
                i, kind = cols.index[j, step], cols.kind[j, step]
                bias = None
                if extras.bias is not None:
                    bias = extras.key_bias[:, j, step]
                weights, dscores, _ = terms(i, j, kind, bias)
                dk += jnp.einsum("gqk,gqd->kd", dscores, q[i], preferred_element_type=wide)
                dv += jnp.einsum("gqk,gqd->kd", weights, dout[i], preferred_element_type=wide)
                return dk, dv

            start = jnp.zeros((bkv, d), wide), jnp.zeros((bkv, d), wide)
            start = vary_alike(*start, *(x.ravel()[0] for x in jax.tree.leaves(inputs)))[:2]
            return lax.fori_loop(0, cols.count[j], add, start)

        dq, dbias = lax.map(row, jnp.arange(q.shape[0], dtype=jnp.int32))
        dk, dv = lax.map(col, jnp.arange(k.shape[0], dtype=jnp.int32))
        dq = dq.swapaxes(0, 1).reshape(g, t, d)
        return dq, dk.reshape(-1, d), dv.reshape(-1, d), dbias.swapaxes(0, 1)

    by_query, by_key = (BlockLists(*(spread(x) for x in lists)) for lists in (rows, cols))
    stacked = (x.reshape(b * a, *x.shape[2:]) for x in (q, lse, dout, delta))
    q_, lse_, dout_, delta_ = stacked
    units = (q_, spread(k), spread(v), lse_, dout_, delta_, by_query, by_key, spread_extras(extras))
    dq, dk, dv, dbias = lax.map(unit, units)
    heads = k.shape[1]
    dk, dv = (x.reshape(b, heads, a // heads, *x.shape[1:]).sum(2) for x in (dk, dv))
    dbias = None if extras.bias is None else dbias.reshape(b, a, *dbias.shape[1:])
    return dq.reshape(q.shape).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dbias


def mass(form: Form, q, k, lse, rows: BlockLists, extras: Extras):
    """Sums of exp(score - lse) over the keys of each entry and the queries: [B, A, G, R, W]."""
    b, a, g, t, d = q.shape
    bq, bkv = form.block_size
    spread, spread_extras = _units(q)

    def unit(inputs):
        q, k, lse, rows, extras = inputs
        q, lse = (x.reshape(g, -1, bq, *x.shape[2:]).swapaxes(0, 1) for x in (q, lse))
        k = k.reshape(-1, bkv, d)
        real = jnp.arange(t).reshape(-1, bq) < form.shape[0]

        def entry(i, step):
            j, kind = rows.index[i, step], rows.kind[i, step]
            bias = None if extras.bias is None else extras.bias[:, i, step]
            scores, _ = _scores(form, q[i], k[j], i, j, kind, extras, bias)
            low = jnp.where(lse[i] == -jnp.inf, 0, lse[i])
            seen = (scores > _MASKED / 2) & real[i][:, None] & (step < rows.count[i])
            return jnp.sum(jnp.where(seen, jnp.exp(scores - low[..., None]), 0), (1, 2))

        def row(i):
            return lax.map(lambda step: entry(i, step), jnp.arange(rows.index.shape[1]))

        return lax.map(row, jnp.arange(q.shape[0], dtype=jnp.int32)).transpose(2, 0, 1)

    lists = BlockLists(*(spread(x) for x in rows))
    units = (
        q.reshape(b * a, g, t, d),
        spread(k),
        lse.reshape(b * a, g, t),
        lists,
        spread_extras(extras),
    )
    return lax.map(unit, units).reshape(b, a, g, *rows.index.shape[2:])
