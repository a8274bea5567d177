"""Decode attention over listed pages in plain JAX: fast on a CPU, the fallback elsewhere.

All lists are cut into parts of a few hundred keys and the parts of all lists are put in a row, so
that a long list beside short ones costs no more than its own parts. A loop takes some parts a turn:
it gathers their pages, and keeps for each the sum of weighted values, the largest score and the sum
of weights; the parts of each list are then merged. The loop is as long as there are parts, which is
known when it runs.

FLOPs 4 D a key and query. Bytes: the listed pages, gathered and read again while in cache, so that
memory beyond the operands is that of a turn, and D + 2 floats a part and query. Keys and values are
gathered apart: products of parts of a gathered array would copy them once more.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._op import sum_type, vary_alike

if TYPE_CHECKING:
    from pallas_kernels._sparse_decode import Lists

PART = 512  # keys of a part of a list
AT_ONCE = {"cpu": 1024}  # keys of a turn, which stay in the cache of a CPU
AT_ONCE_ELSEWHERE = 2**16


def _gather(
    kv_pages: jax.Array, page: jax.Array, head: jax.Array, begin: tuple[int, int], d: int
) -> jax.Array:
    """Pages [u, c] of heads [u], from plane and column `begin`: [u, c * page, d]."""
    head = jnp.broadcast_to(head[:, None], page.shape)
    zero = jnp.zeros_like(page)
    plane, column = begin
    found = lax.gather(
        kv_pages,
        jnp.stack([page, head, zero + plane, zero, zero + column], -1),
        lax.GatherDimensionNumbers((2, 3), (0, 1, 2), (0, 1, 2, 3, 4)),
        (1, 1, 1, kv_pages.shape[3], d),
        mode="promise_in_bounds",
    )
    return found.reshape(page.shape[0], -1, d)


@partial(jax.jit, static_argnames=("scale", "logit_softcap", "return_lse"))
def attend(
    q: jax.Array,
    kv_pages: jax.Array,
    lists: Lists,
    positions: jax.Array,
    *,
    scale: float,
    logit_softcap: float | None,
    return_lse: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """Out [L, R, D] and lse [L, R] of rows [L, R, D]; see `IMPLEMENTATIONS`."""
    (n, r, d), (_, kv_heads, planes, page, width) = q.shape, kv_pages.shape
    p, wide = lists.page.shape[1], sum_type(q.dtype)
    c = min(p, max(1, PART // page))
    parts = -(-p // c)
    at_once = AT_ONCE.get(jax.default_backend(), AT_ONCE_ELSEWHERE)
    u = min(n * parts, max(1, at_once // (c * page)))
    room = -(-n * parts // u) * u

    def cut(a: jax.Array, fill: int) -> jax.Array:
        a = jnp.pad(a, ((0, 0), (0, parts * c - p)), constant_values=fill)
        return a.reshape(n, parts, c)

    pages, starts = cut(lists.page, 0), cut(lists.start, 2**30)
    per = -(-lists.count // c)
    ends = jnp.cumsum(per)
    first = ends - per
    seen = jnp.repeat(positions, r // positions.shape[1], 1)  # [B, R]
    newest = positions.max(1)

    def turn(t: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        item = t * u + jnp.arange(u, dtype=jnp.int32)
        line = jnp.minimum(jnp.searchsorted(ends, item, side="right"), n - 1)
        part = jnp.clip(item - first[line], 0, parts - 1)
        place, start, head = pages[line, part], starts[line, part], line % kv_heads
        at = (start[..., None] + jnp.arange(page, dtype=jnp.int32)).reshape(u, -1)
        keys = _gather(kv_pages, place, head, (0, 0), d)
        values = _gather(kv_pages, place, head, (planes - 1, width - d), d)
        live = at <= newest[line // kv_heads][:, None]
        values = jnp.where(live[..., None], values, jnp.zeros((), values.dtype))
        scores = jnp.einsum("urd,usd->urs", q[line], keys, preferred_element_type=wide) * scale
        if logit_softcap is not None:
            scores = logit_softcap * jnp.tanh(scores / logit_softcap)
        scores = jnp.where(at[:, None] <= seen[line // kv_heads][..., None], scores, -jnp.inf)
        top = scores.max(-1)
        weights = jnp.exp(scores - jnp.where(top > -jnp.inf, top, 0)[..., None])
        total = jnp.einsum(
            "urs,usd->urd", weights.astype(q.dtype), values, preferred_element_type=wide
        )
        new = total, top, weights.sum(-1)
        return tuple(
            lax.dynamic_update_slice_in_dim(a, b, t * u, 0) for a, b in zip(found, new, strict=True)
        )

    empty = jnp.zeros((room, r, d), wide), jnp.zeros((room, r), wide), jnp.zeros((room, r), wide)
    empty = vary_alike(*empty, q, kv_pages, positions, *lists)[:3]
    found = lax.fori_loop(0, -(-ends[-1] // u), turn, empty)

    place = jnp.arange(parts, dtype=jnp.int32)
    live = (place < per[:, None])[..., None]
    total, top, mass = (a[jnp.minimum(first[:, None] + place, room - 1)] for a in found)
    top = jnp.where(live, top, -jnp.inf)
    most = top.max(1)
    seen_any = most > -jnp.inf
    share = jnp.exp(top - jnp.where(seen_any, most, 0)[:, None])
    mass = (share * mass).sum(1)
    total = jnp.einsum("npr,nprd->nrd", share, total, precision="highest")
    out = total / jnp.where(seen_any, mass, 1)[..., None]
    lse = most + jnp.log(jnp.where(seen_any, mass, 1))
    return out.astype(q.dtype), lse.astype(jnp.float32) if return_lse else None
