"""Operands for the cases of `sparse_decode_attention`, and the answers by numpy."""

import jax.numpy as jnp
import numpy as np

from experiments.check_kernels import error


def operands(case, seed=0):
    """q, cache, ids, counts, table and positions; NaN wherever nothing may be read.

    The first list is empty and the last one full; lengths are ragged, and the pages of the
    sequences are mixed. Ids past a count are of pages that are not there.
    """
    rng = np.random.default_rng(seed)
    b, t, (h, kv_heads), d, page = case.batch, case.tokens, case.heads, case.d, case.page
    places = -(-case.length // page)
    lengths = rng.integers(t, case.length + 1, b)
    lengths[-1] = case.length
    stored = b * places + 3
    table = rng.permutation(stored)[: b * places].reshape(b, places)
    cache = np.full((stored, kv_heads, page, 2 * d), np.nan, np.float32)
    ids = np.full((b, kv_heads, case.entries), -1)
    count = np.zeros((b, kv_heads), int)
    for i in range(b):
        for place in range(places):
            keys = np.clip(lengths[i] - place * page, 0, page)
            cache[table[i, place], :, :keys] = rng.standard_normal((kv_heads, keys, 2 * d))
        used = -(-lengths[i] // page)
        for j in range(kv_heads):
            most = min(used, case.entries)
            count[i, j] = rng.integers(0, most + 1)
            if (i, j) == (0, 0):
                count[i, j] = 0
            if (i, j) == (b - 1, kv_heads - 1):
                count[i, j] = most
            ids[i, j, : count[i, j]] = rng.permutation(used)[: count[i, j]]
    if case.planes == 2:
        cache = cache.reshape(stored, kv_heads, page, 2, d).swapaxes(2, 3)
    else:
        cache = cache[:, :, None]
    positions = lengths[:, None] - t + np.arange(t)
    q = rng.standard_normal((b, t, h, d))
    return (
        jnp.asarray(q, case.dtype),
        jnp.asarray(cache, case.dtype),
        *(jnp.asarray(a, jnp.int32) for a in (ids, count, table, positions)),
    )


def oracle(q, cache, ids, count, table, positions, scale=None, softcap=None):
    """Out and lse by numpy in float64: softmax over the keys of the listed pages, one by one."""
    q, cache = np.asarray(q, np.float64), np.asarray(cache, np.float64)
    ids, count, table, positions = (np.asarray(a) for a in (ids, count, table, positions))
    (b, t, h, d), page = q.shape, cache.shape[3]
    keys, values = cache[:, :, 0, :, :d], cache[:, :, -1, :, -d:]
    cache = np.concatenate([keys, values], -1)
    group = h // cache.shape[1]
    out, lse = np.zeros(q.shape), np.full((b, t, h), -np.inf)
    for i, j, token in np.ndindex(b, h, t):
        head = j // group
        rows = []
        for place in ids[i, head, : count[i, head]]:
            seen = np.clip(positions[i, token] + 1 - place * page, 0, page)
            rows.append(cache[table[i, place], head, :seen])
        rows = np.concatenate([np.zeros((0, 2 * d)), *rows])
        if not len(rows):
            continue
        scores = rows[:, :d] @ q[i, token, j] * (d**-0.5 if scale is None else scale)
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        weights = np.exp(scores - scores.max())
        out[i, token, j] = weights @ rows[:, d:] / weights.sum()
        lse[i, token, j] = scores.max() + np.log(weights.sum())
    return out, lse


def assert_right(got, want, case):
    """Out and lse are right, of their dtypes, and nothing is where nothing is seen."""
    (out, lse), (out_too, lse_too) = got, want
    assert out.dtype == jnp.dtype(case.dtype) and lse.dtype == jnp.float32
    assert error(out, out_too) <= case.tolerance
    empty = np.isneginf(lse_too)
    assert (np.isneginf(np.asarray(lse)) == empty).all()
    assert not np.asarray(out, np.float32)[empty].any()
    assert error(np.asarray(lse)[~empty], lse_too[~empty]) <= case.tolerance
