"""A paged key-value cache for `sparse_decode_attention`: how to fill it, and to choose pages.

Each page and key head keeps a summary of its keys, one row; a query is scored against all rows, and
the pages of the highest scores are read. Bounds of each coordinate give the largest score that any
key of the page can have: sum_d max(q_d high_d, q_d low_d) = relu(q) . high + min(q, 0) . low, which
is one product with the row (high, low). A selection may serve several steps and layers.

References: Tang et al., Quest, 2024, arXiv:2406.10774; Yang et al., LServe, 2025, arXiv:2502.14866.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def to_pages(
    k: jax.Array, v: jax.Array, page_size: int, *, max_pages: int = 0, one_plane: bool = False
) -> tuple[jax.Array, jax.Array]:
    """A paged cache with the keys and values of whole sequences, as after a prefill.

    Args:
        k: `[B, S, H_kv, D]`.
        v: Like k.
        page_size: Tokens of a page.
        max_pages: Pages to give each sequence, for tokens to come; those of S tokens if more.
        one_plane: Store key and value in one row, as a TPU needs for D = 64.

    Returns:
        kv_pages `[B * pages, H_kv, 2, page_size, D]`, or `[.., 1, page_size, 2 * D]`, with zeros
        behind the tokens, and block_table `[B, pages]`.

    Raises:
        ValueError: If k and v differ in shape.

    Example:
        >>> kv_pages, table = to_pages(jnp.ones((1, 5, 2, 4)), jnp.ones((1, 5, 2, 4)), 2)
        >>> kv_pages.shape, table.tolist()
        ((3, 2, 2, 2, 4), [[0, 1, 2]])
    """
    if k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"k and v must both be [B, S, H_kv, D]; got {k.shape} and {v.shape}.")
    b, s, h, d = k.shape
    pages = max(max_pages, -(-s // page_size))
    room = ((0, 0), (0, pages * page_size - s), (0, 0), (0, 0))
    k, v = (jnp.pad(a, room).reshape(b * pages, page_size, h, d).swapaxes(1, 2) for a in (k, v))
    joined = jnp.concatenate([k, v], -1)[:, :, None] if one_plane else jnp.stack([k, v], 2)
    return joined, jnp.arange(b * pages, dtype=jnp.int32).reshape(b, pages)


def append_to_pages(
    kv_pages: jax.Array, block_table: jax.Array, positions: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
    """The cache with the keys and values of new tokens written; in place if it is donated to a jit.

    Args:
        kv_pages: As from `to_pages`.
        block_table: int `[B, max_pages]`, where the pages of each sequence are stored.
        positions: int `[B, T]`; a token whose page is not in the table, such as -1, is dropped.
        k: `[B, T, H_kv, D]`.
        v: Like k.

    Returns:
        kv_pages with B * T rows replaced.

    Example:
        >>> kv_pages, table = to_pages(jnp.zeros((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1)), 2)
        >>> one = jnp.ones((1, 1, 1, 1))
        >>> append_to_pages(kv_pages, table, jnp.array([[1]]), one, 2 * one).ravel().tolist()
        [0.0, 1.0, 0.0, 2.0]
    """
    stored, _, planes, page, _ = kv_pages.shape
    places = block_table.shape[1]
    place = positions // page
    at = jnp.take_along_axis(block_table, jnp.clip(place, 0, places - 1), 1)
    there = (positions >= 0) & (place < places) & (at >= 0)
    at = jnp.where(there, at, stored)  # beyond the last page: dropped
    new = jnp.stack([k, v], 3) if planes == 2 else jnp.concatenate([k, v], -1)[..., None, :]
    return kv_pages.at[at, :, :, positions % page].set(new.astype(kv_pages.dtype), mode="drop")


def _keys(kv_pages: jax.Array) -> jax.Array:
    """The keys [pages, H_kv, page, D] of a cache."""
    planes, width = kv_pages.shape[2], kv_pages.shape[4]
    return kv_pages[:, :, 0, :, : width * planes // 2]


def page_bounds(kv_pages: jax.Array, filled: jax.Array | None = None) -> jax.Array:
    """The largest and the smallest key of each page, by coordinate, for `page_scores`.

    Args:
        kv_pages: A cache, or some pages of one, whose summaries are to be renewed.
        filled: int `[pages]`, how many tokens a page has; all if not given. A page that is always
            selected needs no right summary, and the page being written to should be.

    Returns:
        `[pages, H_kv, 2 * D]`, the largest, then the smallest; of a page without tokens minus and
        plus infinity.

    Example:
        >>> kv_pages, _ = to_pages(jnp.array([[[[1.0]], [[-2.0]]]]), jnp.zeros((1, 2, 1, 1)), 2)
        >>> page_bounds(kv_pages).tolist()
        [[[1.0, -2.0]]]

    Cost: reads the keys once, and needs 1 / page_size of the memory of the cache.
    """
    keys = _keys(kv_pages)
    live = _live(keys, filled)
    high = jnp.max(keys, 2, initial=-jnp.inf, where=live)
    low = jnp.min(keys, 2, initial=jnp.inf, where=live)
    return jnp.concatenate([high, low], -1)


def page_means(kv_pages: jax.Array, filled: jax.Array | None = None) -> jax.Array:
    """The mean key of each page, for `page_scores`; arguments as of `page_bounds`.

    Returns:
        `[pages, H_kv, D]`; zero for a page without tokens.

    Example:
        >>> kv_pages, _ = to_pages(jnp.array([[[[1.0]], [[-2.0]]]]), jnp.zeros((1, 2, 1, 1)), 2)
        >>> page_means(kv_pages).tolist()
        [[[-0.5]]]
    """
    keys = _keys(kv_pages)
    live = _live(keys, filled)
    total = jnp.sum(keys, 2, where=live, dtype=jnp.float32)
    return (total / jnp.maximum(live.sum(2), 1)).astype(keys.dtype)


def _live(keys: jax.Array, filled: jax.Array | None) -> jax.Array:
    """Which rows of a page hold a token, [pages or 1, 1, page, 1]."""
    row = jnp.arange(keys.shape[2])[:, None]
    if filled is None:
        return (row >= 0)[None, None]
    return row < filled[:, None, None, None]


def page_scores(q: jax.Array, summaries: jax.Array, block_table: jax.Array) -> jax.Array:
    """How much each page of a sequence may matter to its new tokens.

    With `page_bounds` an upper bound of q . k over the keys of the page, with `page_means` q times
    their mean; the largest over the tokens and over the query heads that share a key head.

    Args:
        q: `[B, T, H, D]`.
        summaries: `[pages, H_kv, 2 * D]` from `page_bounds`, or `[pages, H_kv, D]`.
        block_table: int `[B, max_pages]`.

    Returns:
        `[B, H_kv, max_pages]` float32.

    Raises:
        ValueError: If the summaries fit neither.

    Example:
        >>> bounds = jnp.array([[[1.0, -2.0]], [[0.5, 0.0]]])  # two pages, D = 1
        >>> page_scores(jnp.full((1, 1, 1, 1), -1.0), bounds, jnp.array([[1, 0]])).tolist()
        [[[0.0, 2.0]]]

    Cost: gathers one row a page, then 2 or 4 D FLOPs a page and query.
    Deviations: the papers do not say how heads that share keys are joined; here by the maximum.
    """
    b, t, h, d = q.shape
    kv_heads = summaries.shape[1]
    if summaries.shape[-1] not in (d, 2 * d) or h % kv_heads:
        raise ValueError(
            f"summaries must be [pages, H_kv, 2 * D] or [pages, H_kv, D] for q {q.shape}, with H a "
            f"multiple of H_kv; got {summaries.shape}."
        )
    if summaries.shape[-1] == 2 * d:
        q = jnp.concatenate([jnp.maximum(q, 0), jnp.minimum(q, 0)], -1)
    q = q.reshape(b, t, kv_heads, h // kv_heads, -1)
    rows = summaries[jnp.maximum(block_table, 0)]
    scores = jnp.einsum("btkgd,bpkd->bkptg", q, rows, preferred_element_type=jnp.float32)
    return scores.max((-2, -1))


def select_pages(
    scores: jax.Array,
    positions: jax.Array,
    page_size: int,
    capacity: int,
    *,
    count: jax.Array | int | None = None,
    first: int = 1,
    last: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """The pages of the highest scores for each sequence and key head, and those always taken.

    The first pages (attention sinks) and the last ones (the newest tokens) are always among them;
    pages behind the newest token never are. With `count=first + last` a head sees these alone, as
    streaming heads do, beside heads of a larger count.

    Args:
        scores: `[B, H_kv, max_pages]`, any; NaN ranks last. Ties go to the first page.
        positions: int `[B, T]` of the new tokens; -1 for one that is not there.
        page_size: Tokens of a page.
        capacity: Length P of the lists.
        count: How many pages to take, up to capacity, traced if need be: a number, or an array that
            broadcasts to `[B, H_kv]`. All that fit if not given.
        first: Pages to take at the beginning.
        last: Pages to take up to that of the oldest new token; those of the newer ones come too.

    Returns:
        page_ids int32 `[B, H_kv, P]`, -1 behind the count, and page_count int32 `[B, H_kv]`.

    Raises:
        ValueError: If capacity exceeds max_pages, or does not hold what is always taken.

    Example:
        >>> scores = jnp.array([[[0.0, 1.0, 3.0, 2.0, 0.0]]])
        >>> ids, count = select_pages(scores, jnp.array([[17]]), 4, 3)  # pages of 4 tokens
        >>> ids.tolist(), count.tolist()
        ([[[4, 0, 2]]], [[3]])

    Cost: one `lax.top_k` of max_pages scores a list.
    """
    places, t = scores.shape[-1], positions.shape[1]
    always = first + last + -(-(t - 1) // page_size)
    if capacity != places and not always <= capacity <= places:
        raise ValueError(
            f"capacity must be {always}, which first={first}, last={last} and {t} new tokens take, "
            f"to {places}, the pages of the table; got {capacity}. Lists of all pages always fit."
        )
    newest = positions.max(1, keepdims=True)
    oldest = jnp.where(positions >= 0, positions, newest).min(1, keepdims=True)
    place = jnp.arange(places, dtype=positions.dtype)
    seen = place <= newest // page_size
    late = seen & (place > oldest // page_size - last)
    most = jnp.finfo(scores.dtype).max
    # Late pages first: they hold the tokens themselves, if a count does not reach for all.
    rank = jnp.clip(jnp.nan_to_num(scores, nan=-most), -most, most / 2)
    rank = jnp.where((place < first)[None, None], most, rank)
    rank = jnp.where(late[:, None], jnp.inf, rank)
    rank = jnp.where(seen[:, None], rank, -jnp.inf)
    ids = lax.top_k(rank, capacity)[1].astype(jnp.int32)
    taken = seen.sum(1, dtype=jnp.int32)[:, None]
    limit = jnp.minimum(jnp.asarray(capacity if count is None else count, jnp.int32), capacity)
    taken = jnp.broadcast_to(jnp.maximum(jnp.minimum(taken, limit), 0), scores.shape[:2])
    index = jnp.arange(capacity, dtype=jnp.int32)
    return jnp.where(index < taken[..., None], ids, -1), taken
