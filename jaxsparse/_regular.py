"""Selection in small squares: the same number of scores in every row and in every column.

What `TransposableNM` keeps, next to `jaxsparse.select`, and by the same order of scores.

* Squares of at most 4 x 4: all 0/1 matrices with equal row and column sums are tried (140 of them
  for 4 x 4, 90 of which keep two), so the sum of the kept scores is the largest there is.
* Larger ones: greedily from the largest score, then rows and columns that are not full are filled
  by the exchange that gains most. While a row i and a column j are short, (i, j) itself is kept
  (greed would have taken it), and there is always a kept (r, c) with (i, c) and (r, j) free: taking
  these two for that one fills i and j by one each and leaves all other sums as they are.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxsparse.select import sort_key

EXACT = 4  # the largest square for which every pattern is tried
_CHUNK = 10  # patterns scored at a time


@functools.cache
def regular_patterns(m: int) -> np.ndarray:
    """Every 0/1 matrix `[m, m]` with equal row and column sums, bool `[patterns, m, m]`.

    In descending order of the flat matrix, so that of two equal sums the earlier entries win.
    """
    found = []
    for count in range(m + 1):
        rows = [np.isin(range(m), kept) for kept in itertools.combinations(range(m), count)]
        for square in itertools.product(rows, repeat=m):
            if (np.sum(square, 0) == count).all():
                found.append(np.stack(square))
    return np.stack(sorted(found, key=lambda s: np.asarray(s).tobytes(), reverse=True))


def keep_regular(scores: jax.Array, count: jax.Array) -> jax.Array:
    """`count` scores of every row and every column, with a large sum.

    Args:
        scores: `[..., m, m]`, any real dtype.
        count: int32 `[...]`, 0 to m; may be traced.

    Returns:
        A bool mask of the shape of `scores`. NaN is never kept: a row or column that cannot do
        without one keeps fewer.
    """
    count = jnp.clip(count, 0, scores.shape[-1])
    best = _best_pattern if scores.shape[-1] <= EXACT else _greedy
    return best(scores, count) & (scores == scores)


def _best_pattern(scores: jax.Array, count: jax.Array) -> jax.Array:
    *lead, m, _ = scores.shape
    wide = jnp.float64 if scores.dtype == jnp.float64 else jnp.float32
    flat = scores.astype(wide).reshape(*lead, m * m)
    # First few NaN, then few -inf, then many inf; only then the sum of what is finite.
    level = jnp.where(flat == jnp.inf, 1.0, jnp.where(flat == -jnp.inf, -32.0, 0.0)).astype(wide)
    level = jnp.where(jnp.isnan(flat), jnp.asarray(-1024, wide), level)
    finite = jnp.where(jnp.isfinite(flat), flat, jnp.zeros((), wide)) / (m * m)  # cannot overflow
    table = regular_patterns(m)
    chunks = table.reshape(-1, _CHUNK if len(table) % _CHUNK == 0 else len(table), m * m)

    def add(x: jax.Array, chunk: jax.Array) -> jax.Array:
        return jnp.matmul(x, chunk.T.astype(wide), precision=lax.Precision.HIGHEST)

    def try_chunk(best: tuple[jax.Array, ...], chunk: jax.Array) -> tuple[tuple, None]:
        levels, sums = add(level, chunk), add(finite, chunk)
        fits = jnp.sum(chunk, -1, dtype=jnp.int32) == m * count[..., None]
        levels = jnp.where(fits, levels, -jnp.inf)
        top = jnp.max(levels, -1)
        sums = jnp.where(fits & (levels == top[..., None]), sums, -jnp.inf)
        first = jnp.argmax(sums, -1)
        total = jnp.max(sums, -1)
        square = jnp.take(chunk, first, axis=0)
        better = (top > best[0]) | (top == best[0]) & (total > best[1])
        mask = jnp.where(better[..., None], square, best[2])
        return (jnp.where(better, top, best[0]), jnp.where(better, total, best[1]), mask), None

    lowest = jnp.full(tuple(lead), -jnp.inf, wide)
    start = (lowest, lowest, jnp.zeros(flat.shape, bool))
    (_, _, mask), _ = lax.scan(try_chunk, start, jnp.asarray(chunks))
    return mask.reshape(scores.shape)


def _greedy(scores: jax.Array, count: jax.Array) -> jax.Array:
    *lead, m, _ = scores.shape
    key = sort_key(scores).reshape(*lead, m * m)
    order = jnp.argsort(key, axis=-1, descending=True, stable=True)
    index = jnp.arange(m * m).reshape(m, m)
    most = count[..., None, None]

    def take(t: jax.Array, mask: jax.Array) -> jax.Array:
        here = index == lax.dynamic_index_in_dim(order, t, len(lead))[..., None]
        room = (_sums(mask, -1) < most) & (_sums(mask, -2) < most)
        return mask | here & room

    mask = lax.fori_loop(0, m * m, take, jnp.zeros(scores.shape, bool))
    wide = jnp.float64 if scores.dtype == jnp.float64 else jnp.float32
    big = float(jnp.finfo(wide).max) / 8
    s = scores.astype(wide)
    s = jnp.where(jnp.isnan(s), jnp.asarray(-2 * big, wide), jnp.clip(s, -big, big))

    def first(short: jax.Array, axis: int) -> jax.Array:
        return short & (jnp.cumsum(short, axis, dtype=jnp.int32) == 1)

    def fill(mask: jax.Array) -> jax.Array:
        row = first(_sums(mask, -1) < most, -2)  # [..., m, 1], at most one True
        column = first(_sums(mask, -2) < most, -1)  # [..., 1, m]
        in_row, in_column = jnp.any(mask & row, -2, keepdims=True), _any(mask & column)
        gain = _pick(s, row, -2) + _pick(s, column, -1) - s
        allowed = mask & ~in_row & ~in_column & jnp.any(row, -2, keepdims=True)
        flat = jnp.where(allowed, gain, -jnp.inf).reshape(*lead, m * m)
        out = allowed & (index == jnp.argmax(flat, -1)[..., None, None])
        new_row, new_column = _any(out), jnp.any(out, -2, keepdims=True)
        return (mask & ~out) | (row & new_column) | (new_row & column)

    return lax.while_loop(lambda mask: jnp.any(_sums(mask, -1) < most), fill, mask)


def _sums(mask: jax.Array, axis: int) -> jax.Array:
    return jnp.sum(mask, axis, keepdims=True, dtype=jnp.int32)


def _any(mask: jax.Array) -> jax.Array:
    return jnp.any(mask, -1, keepdims=True)


def _pick(s: jax.Array, one: jax.Array, axis: int) -> jax.Array:
    return jnp.sum(jnp.where(one, s, jnp.zeros((), s.dtype)), axis, keepdims=True)
