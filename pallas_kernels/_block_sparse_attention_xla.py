"""Block-sparse attention in plain JAX: loops over the listed blocks, with an online softmax.

Trip counts are traced: nothing is padded to the longest list. Blocks are read from and written to
arrays in the layout of the user, [B, T, H, D], so that no other copy of them is made, and memory
beyond inputs and outputs is a few tiles. The backward pass is in
`_block_sparse_attention_gradient_xla.py`. All sums are in a fixed order, hence deterministic.

The G query heads of a unit are stacked in rows: a tile has bq * G rows, query after query.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._attention_plan import Extras, Form, allowed
from pallas_kernels._block_lists import BlockLists
from pallas_kernels._op import sum_type, vary_alike

MASKED = -1e30  # finite, so that no difference of scores is NaN
LEAST = -1e29  # maxima begin here, so that exp(MASKED - maximum) = 0 also where all is masked


class Line(NamedTuple):
    """A block of queries, or of keys, of a unit: batch entry, unit, block, all int32 scalars."""

    b: jax.Array
    unit: jax.Array
    block: jax.Array


def line(number: jax.Array, units: int, blocks: int) -> Line:
    """Line `number` of all lines of all units, counted [B, A, blocks]."""
    b, rest = number // (units * blocks), number % (units * blocks)
    return Line(b, rest // blocks, rest % blocks)


def entry(x: jax.Array, at: Line, units: int) -> jax.Array:
    """x[b, head, block] of an array [B or 1, heads, blocks, ...]; units may share a head."""
    b = at.b if x.shape[0] > 1 else 0
    return x[b, at.unit * x.shape[1] // units, at.block]


def tokens(x: jax.Array, at: Line, size: int, units: int) -> jax.Array:
    """Tile [size * heads, ...] of tokens of a unit, from [B, T, H, ...] or, of all, [B or 1, T]."""
    b = at.b if x.shape[0] > 1 else 0
    if x.ndim == 2:
        return lax.dynamic_slice(x, (b, at.block * size), (1, size))[0]
    h = x.shape[2]
    heads = max(h // units, 1)
    start = (b, at.block * size, at.unit * h // units, *[0] * (x.ndim - 3))
    return lax.dynamic_slice(x, start, (1, size, heads, *x.shape[3:])).reshape(-1, *x.shape[3:])


def put(
    x: jax.Array, tile: jax.Array, at: Line, size: int, units: int, *, add: bool = False
) -> jax.Array:
    """X with a tile of tokens written, or added, in place inside a loop; see `tokens`."""
    h = x.shape[2]
    tile = tile.reshape(1, size, max(h // units, 1), *x.shape[3:])
    start = (at.b, at.block * size, at.unit * h // units, *[0] * (x.ndim - 3))
    if add:
        tile = tile + lax.dynamic_slice(x, start, tile.shape)
    return lax.dynamic_update_slice(x, tile.astype(x.dtype), start)


def by_token(x: jax.Array) -> jax.Array:
    """[B, A, G, T, D] -> [B, T, A * G, D]; undoes what the caller did, so it costs nothing."""
    return x.reshape(x.shape[0], -1, *x.shape[3:]).swapaxes(1, 2)


def in_rows(x: jax.Array) -> jax.Array:
    """[B, A, G, T] -> [B, A, T * G], a number for each row of the tiles of a unit."""
    return x.swapaxes(2, 3).reshape(*x.shape[:2], -1)


def rows_of(x: jax.Array, at: Line, size: int) -> jax.Array:
    """Those of a block of queries, [size]; they lie side by side, else XLA does not vectorize."""
    return lax.dynamic_slice(x, (at.b, at.unit, at.block * size), (1, 1, size)).ravel()


def put_rows(x: jax.Array, values: jax.Array, at: Line) -> jax.Array:
    """X with the values of a block of queries, in place inside a loop."""
    start = (at.b, at.unit, at.block * len(values))
    return lax.dynamic_update_slice(x, values[None, None], start)


def in_heads(x: jax.Array, group: int) -> jax.Array:
    """[B, A, T * G] -> [B, A, G, T]."""
    return x.reshape(*x.shape[:2], -1, group).swapaxes(2, 3)


def zeros_of(lists: BlockLists, *arrays: Any) -> tuple[jax.Array, ...]:
    """Three zeros that vary as all arrays do together, and that XLA does not know to be zero.

    It keeps one array of what is known to be alike for all carries of loops, and copies it.
    """
    zeros = [(x.ravel()[0] < 0).astype(jnp.float32) for x in (lists.count, lists.full, lists.index)]
    return vary_alike(*zeros, *lists, *jax.tree.leaves(arrays))[:3]


def hidden(form: Form, lse: jax.Array) -> jax.Array:
    """Lse [B, A, T * G], inf for queries past the end or that see no key: then exp(s - lse) = 0."""
    past = jnp.arange(lse.shape[3]) >= form.shape[0]
    return in_rows(jnp.where((lse == -jnp.inf) | past, jnp.inf, lse))


def tile_of(
    form: Form,
    scores: jax.Array,
    q_block: jax.Array,
    k_block: jax.Array,
    extras: Extras,
    at: Line,
    bias: jax.Array | None,
    kind: jax.Array | None,
    *,
    transposed: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Scores of a tile from q k^T, [bq * G, bkv] or its transpose, and tanh of them if capped.

    `kind` is that of a partial block, whose forbidden pairs become MASKED; None for a full block.
    `bias` is [G]. Of `at` only the batch entry counts.
    """
    bq, bkv = form.block_size
    group = scores.shape[1 if transposed else 0] // bq
    queries, keys = (1, 0) if transposed else (0, 1)
    scores, slope = scores * form.scale, None
    if form.softcap is not None:
        slope = jnp.tanh(scores / form.softcap)
        scores = slope * form.softcap
    if bias is not None:
        scores = scores + lax.expand_dims(jnp.tile(bias, bq), [keys])
    if kind is None:
        return scores, slope
    row = lax.expand_dims(jnp.arange(bq * group, dtype=jnp.int32) // group, [keys])
    column = lax.expand_dims(jnp.arange(bkv, dtype=jnp.int32), [queries])
    segments = ()
    if extras.q_segments is not None and extras.k_segments is not None:
        q_ids = tokens(extras.q_segments, at._replace(block=q_block), bq, 1)
        k_ids = tokens(extras.k_segments, at._replace(block=k_block), bkv, 1)
        segments = (
            lax.expand_dims(jnp.repeat(q_ids, group), [keys]),
            lax.expand_dims(k_ids, [queries]),
        )
    offset = extras.offset[at.b if extras.offset.shape[0] > 1 else 0]
    seen = allowed(form, kind, q_block * bq + row, k_block * bkv + column, offset, *segments)
    return jnp.where(seen, scores, MASKED), slope


def each_entry(
    form: Form, extras: Extras, lists: BlockLists, at: Line, units: int, body: Any, start: Any
) -> Any:
    """Loop over the entries of a line: `body(step, block, kind, carry)`; kind is None if full."""
    index, kind = entry(lists.index, at, units), entry(lists.kind, at, units)
    full, count = entry(lists.full, at, units), entry(lists.count, at, units)
    carry = lax.fori_loop(0, full, lambda t, c: body(t, index[t], None, c), start)
    ragged = form.shape[1] % form.block_size[1] != 0
    if not (form.rules or form.causal or ragged or extras.q_segments is not None):
        return carry  # no block is partial
    return lax.fori_loop(full, count, lambda t, c: body(t, index[t], kind[t], c), carry)


def of_entry(x: jax.Array, at: Line, step: jax.Array) -> jax.Array:
    """[G] of an entry, from [B or 1, A, G, lines, W]."""
    start = (at.b if x.shape[0] > 1 else 0, at.unit, 0, at.block, step)
    return lax.dynamic_slice(x, start, (1, 1, x.shape[2], 1, 1)).ravel()


def put_entry(x: jax.Array, values: jax.Array, at: Line, step: jax.Array) -> jax.Array:
    """X [B, A, G, lines, W] with the [G] values of an entry, in place inside a loop."""
    start = (at.b, at.unit, 0, at.block, step)
    return lax.dynamic_update_slice(x, values.reshape(1, 1, -1, 1, 1), start)


def dot_rows(a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """A @ b^T."""
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def forward(form: Form, q, k, v, rows: BlockLists, extras: Extras):
    """Attention: out [B, A, G, T, D] and lse [B, A, G, T], -inf where a query saw no key."""
    shape, (b, units, g, t, d) = q.shape, q.shape
    bq, bkv = form.block_size
    wide = sum_type(q.dtype)
    zero = zeros_of(rows, q, k, v, extras)[0].astype(wide)
    q, k, v = by_token(q), k.swapaxes(1, 2), v.swapaxes(1, 2)
    blocks = t // bq

    def row(number, results):
        at = line(number, units, blocks)
        queries = tokens(q, at, bq, units)

        def add(step, j, kind, carry):
            high, total, out = carry
            keys = at._replace(block=j)
            scores = dot_rows(queries, tokens(k, keys, bkv, units), wide)
            bias = None if extras.bias is None else of_entry(extras.bias, at, step)
            scores, _ = tile_of(form, scores, at.block, j, extras, at, bias, kind)
            new = jnp.maximum(high, scores.max(-1))
            weights = jnp.exp(scores - new[:, None])
            shrink = jnp.exp(high - new)
            values = tokens(v, keys, bkv, units)
            product = jnp.dot(weights.astype(v.dtype), values, preferred_element_type=wide)
            return new, total * shrink + weights.sum(-1), out * shrink[:, None] + product

        start = (
            jnp.broadcast_to(zero + LEAST, bq * g),
            jnp.broadcast_to(zero, bq * g),
            jnp.broadcast_to(zero, (bq * g, d)),
        )
        high, total, out = each_entry(form, extras, rows, at, units, add, start)
        seen = total > 0
        total = jnp.where(seen, total, 1)
        lse = jnp.where(seen, high + jnp.log(total), -jnp.inf)
        outs, lses = results
        return put(outs, out / total[:, None], at, bq, units), put_rows(lses, lse, at)

    start = (
        jnp.broadcast_to(zero.astype(q.dtype), (b, t, units * g, d)),
        jnp.broadcast_to(zero, (b, units, t * g)),
    )
    out, lse = lax.fori_loop(0, b * units * blocks, row, start)
    return out.swapaxes(1, 2).reshape(shape), in_heads(lse, g)


def mass(form: Form, q, k, lse, rows: BlockLists, extras: Extras):
    """Sums of exp(score - lse) over the keys of each entry and the queries: [B, A, G, R, W]."""
    b, units, g, t, _ = q.shape
    bq, bkv = form.block_size
    wide = sum_type(q.dtype)
    zero = zeros_of(rows, q, k, lse, extras)[0].astype(wide)
    q, k, lse = by_token(q), k.swapaxes(1, 2), hidden(form, lse)
    blocks = t // bq

    def row(number, sums):
        at = line(number, units, blocks)
        queries, low = tokens(q, at, bq, units), rows_of(lse, at, bq * g)

        def add(step, j, kind, sums):
            scores = dot_rows(queries, tokens(k, at._replace(block=j), bkv, units), wide)
            bias = None if extras.bias is None else of_entry(extras.bias, at, step)
            scores, _ = tile_of(form, scores, at.block, j, extras, at, bias, kind)
            totals = jnp.exp(scores - low[:, None]).sum(1)
            return put_entry(sums, totals.reshape(bq, g).sum(0), at, step)

        return each_entry(form, extras, rows, at, units, add, sums)

    start = jnp.broadcast_to(zero, (b, units, g, blocks, rows.index.shape[3]))
    return lax.fori_loop(0, b * units * blocks, row, start)
