"""Paged caches, page summaries and page selection, with the decode kernel they are for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.attention._pages import (
    append_to_pages,
    page_bounds,
    page_means,
    page_scores,
    select_pages,
    to_pages,
)
from pallas_kernels._sparse_decode import check_pages, sparse_decode_attention

B, S, HEADS, KV_HEADS, D, PAGE = 2, 150, 4, 2, 16, 16


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@jax.jit
def dense(q, k, v, seen):
    """Softmax attention of one token to the keys that it sees."""
    return jax.nn.dot_product_attention(q, k, v, mask=seen[None, None, None])


@pytest.mark.parametrize("one_plane", [False, True])
def test_a_decode_loop_over_all_pages_is_dense_attention(one_plane):
    q, k, v = normal(0, B, S, HEADS, D), normal(1, B, S, KV_HEADS, D), normal(2, B, S, KV_HEADS, D)
    begin, places = S - 20, -(-S // PAGE)
    cache, table = to_pages(k[:, :begin], v[:, :begin], PAGE, max_pages=places, one_plane=one_plane)
    bounds = page_bounds(cache)

    @jax.jit
    def step(cache, q, k, v, position):
        positions = jnp.full((B, 1), position)
        cache = append_to_pages(cache, table, positions, k, v)
        scores = page_scores(q, bounds, table)
        ids, count = select_pages(scores, positions, PAGE, places)
        return sparse_decode_attention(q, cache, ids, count, table, positions), cache, count

    for i in range(begin, S):
        new = slice(i, i + 1)
        out, cache, count = step(cache, q[:, new], k[:, new], v[:, new], i)
        want = dense(q[:, new], k, v, jnp.arange(S) <= i)
        np.testing.assert_allclose(out, want, atol=2e-6)
        assert (count == i // PAGE + 1).all()
    assert step._cache_size() == 1
    whole, _ = to_pages(k, v, PAGE, one_plane=one_plane)
    np.testing.assert_array_equal(cache, whole)


def test_the_bound_holds_and_is_reached_on_pages_of_one_token():
    q, k = normal(0, B, 1, HEADS, D), normal(1, B, S, KV_HEADS, D)
    scores = jnp.einsum("btkgd,bskd->bksg", q.reshape(B, 1, KV_HEADS, -1, D), k).max(-1)
    for page in (1, PAGE):
        cache, table = to_pages(k, k, page)
        filled = jnp.clip(S - table % -(-S // page) * page, 0, page).reshape(-1)
        got = page_scores(q, page_bounds(cache, filled), table)
        best = jnp.pad(scores, ((0, 0), (0, 0), (0, -S % page)), constant_values=-jnp.inf)
        best = best.reshape(B, KV_HEADS, -1, page).max(-1)
        assert (got >= best - 1e-4).all()
        if page == 1:
            np.testing.assert_allclose(got, best, atol=1e-5)
            means = page_scores(q, page_means(cache), table)
            np.testing.assert_allclose(means, best, atol=1e-5)


def test_summaries_of_pages_that_are_not_full():
    k = normal(0, 1, 20, 1, D)
    cache, _ = to_pages(k, k, PAGE, max_pages=3)
    cache = jnp.where(cache == 0, jnp.nan, cache)  # what nobody wrote
    filled = jnp.array([PAGE, 4, 0])
    bounds, means = page_bounds(cache, filled), page_means(cache, filled)
    np.testing.assert_allclose(bounds[1, 0, :D], k[0, 16:, 0].max(0))
    np.testing.assert_allclose(bounds[1, 0, D:], k[0, 16:, 0].min(0))
    np.testing.assert_allclose(means[1, 0], k[0, 16:, 0].mean(0), atol=1e-6)
    assert np.isneginf(bounds[2, 0, :D]).all() and not means[2].any()


def test_the_needle_page_is_found():
    k = normal(0, 1, 64 * PAGE, 1, D)
    q = normal(1, 1, 1, 2, D)
    k = k.at[0, 777].set(9 * q[0, 0, 0])
    cache, table = to_pages(k, k, PAGE)
    scores = page_scores(q, page_bounds(cache), table)
    ids, _ = select_pages(scores, jnp.array([[64 * PAGE - 1]]), PAGE, 3)
    assert ids[0, 0].tolist() == [63, 0, 777 // PAGE]


def test_what_is_selected():
    scores = jnp.array([[[5.0, jnp.nan, 3.0, jnp.inf, 4.0, 9.0, 9.0, 9.0]]] * 2)
    positions = jnp.array([[21, 22], [3, -1]])  # pages of 4: the newest page is 5, or 0
    ids, count = select_pages(scores, positions, 4, 6, last=2)
    assert ids[0, 0].tolist() == [4, 5, 0, 3, 2, 1] and count.tolist() == [[6], [1]]
    assert ids[1, 0].tolist() == [0, -1, -1, -1, -1, -1]
    ids, count = select_pages(scores, positions, 4, 6, count=2, last=2)
    assert ids[0, 0].tolist() == [4, 5, -1, -1, -1, -1] and count.tolist() == [[2], [1]]
    table = jnp.arange(16).reshape(2, 8)
    check_pages(ids, count, table, 16)
    # New tokens that begin a page: that of the older ones is taken too.
    ids, _ = select_pages(scores, jnp.array([[11, 12], [-1, -1]]), 4, 3)
    assert sorted(ids[0, 0].tolist()) == [0, 2, 3] and ids[1, 0].tolist() == [-1] * 3


def test_a_count_for_each_head_without_a_new_compilation():
    scores = normal(0, 1, 2, 10)

    @jax.jit
    def select(scores, count):
        return select_pages(scores, jnp.array([[39]]), 4, 6, count=count)

    for streaming, whole in ((2, 6), (3, 4)):
        ids, count = select(scores, jnp.array([streaming, whole]))
        assert count.tolist() == [[streaming, whole]]
        assert ((ids >= 0).sum(-1) == count).all()
    assert select._cache_size() == 1


def test_tokens_without_a_page_are_dropped():
    cache, table = to_pages(jnp.zeros((2, 4, 1, 2)), jnp.zeros((2, 4, 1, 2)), 2)
    table = table.at[1, 1].set(-1)
    one = jnp.ones((2, 1, 1, 2))
    for positions in ([[-1], [-1]], [[4], [2]]):
        assert not append_to_pages(cache, table, jnp.array(positions), one, one).any()
    assert append_to_pages(cache, table, jnp.array([[3], [1]]), one, one).sum() == 8


def test_errors():
    with pytest.raises(ValueError, match=r"must both be \[B, S, H_kv, D\]; got"):
        to_pages(jnp.zeros((1, 2, 1, 4)), jnp.zeros((1, 2, 1, 2)), 2)
    with pytest.raises(ValueError, match="summaries must be"):
        page_scores(jnp.zeros((1, 1, 2, 4)), jnp.zeros((3, 1, 5)), jnp.zeros((1, 3), int))
    scores, positions = jnp.zeros((1, 1, 8)), jnp.array([[30]])
    for capacity in (1, 9):
        with pytest.raises(ValueError, match=f"capacity must be 2, .* to 8,.*; got {capacity}"):
            select_pages(scores, positions, 4, capacity)
