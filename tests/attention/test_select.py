"""Selection against a brute-force sort in numpy, and what it promises."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxsparse.attention import (
    BlockMask,
    block_scores,
    block_sparse_attention,
    causal,
    documents,
    max_pool,
    mean_pool,
    top_k_blocks,
    top_p_blocks,
)
from tests.conformance.lists import fast_jit

SHAPE, BLOCK = (22, 29), (4, 3)  # 6 x 10 blocks, ragged
ROWS, COLS = 6, 10


def visible_and_forced(causal, q_offset, sinks, local):
    visible, forced = np.zeros((2, ROWS, COLS), bool)
    for r in range(ROWS):
        first = 4 * r + q_offset
        last = min(4 * r + 4, SHAPE[0]) - 1 + q_offset
        visible[r] = 3 * np.arange(COLS) <= last if causal else True
        after = 0 if causal else max(local - 1, 0)
        low, high = first // 3 - max(local - 1, 0), last // 3 + after
        forced[r] = np.arange(COLS) < sinks
        if local:
            forced[r, max(low, 0) : max(high + 1, 0)] = True
    return visible, forced & visible


def ranked(scores, visible, forced):
    """Blocks of each row in the order in which they are taken; what cannot be taken is missing."""
    order = []
    for r in range(ROWS):
        rank = [(-np.inf if forced[r, c] else -scores[r, c], c) for c in range(COLS)]
        allowed = [c for c in range(COLS) if visible[r, c] and not np.isnan(scores[r, c])]
        order.append([c for _, c in sorted(rank[c] for c in allowed)])
    return order


options = st.fixed_dictionaries(
    {
        "causal": st.booleans(),
        "q_offset": st.sampled_from([0, 7]),
        "sinks": st.sampled_from([0, 2]),
        "local": st.sampled_from([0, 1, 2]),
    }
)


@st.composite
def scores_of(draw):
    """Scores [2, 3, R, C] with ties, infinities and, not among the forced, NaN."""
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    scores = random.normal(size=(2, 3, ROWS, COLS)).round(draw(st.integers(0, 2)))
    return np.where(random.random(scores.shape) < 0.05, -np.inf, scores).astype(np.float32)


STATIC = ("shape", "block_size", "causal", "q_offset", "sinks", "local")
top_k = fast_jit(top_k_blocks, static_argnames=(*STATIC, "count"))
top_p = fast_jit(top_p_blocks, static_argnames=(*STATIC, "capacity"))


@hypothesis.settings(max_examples=12)
@hypothesis.given(scores_of(), options, st.sampled_from([6, 10]))
def test_top_k_is_the_sort(scores, kwargs, count):
    visible, forced = visible_and_forced(**kwargs)
    mask = top_k(scores, SHAPE, BLOCK, count=count, **kwargs)
    assert mask.by_query.index.shape == (2, 3, ROWS, count)
    found = np.asarray(mask.block_map)
    assert not (found & ~visible).any() and (found >= forced).all()
    for place in np.ndindex(2, 3):
        for r, order in enumerate(ranked(scores[place], visible, forced)):
            assert set(np.flatnonzero(found[place][r])) == set(order[:count])
    if kwargs["causal"]:
        q, k = np.mgrid[: SHAPE[0], : SHAPE[1]]
        assert not np.asarray(mask.todense())[..., k > q + kwargs["q_offset"]].any()


@hypothesis.settings(max_examples=12)
@hypothesis.given(scores_of(), options, st.floats(0, 1), st.sampled_from([6, 10]))
def test_top_p_is_the_smallest_set_that_reaches_the_mass(scores, kwargs, mass, capacity):
    visible, forced = visible_and_forced(**kwargs)
    mask = top_p(scores, SHAPE, BLOCK, mass=np.float32(mass), capacity=capacity, **kwargs)
    assert mask.by_query.index.shape[-1] == capacity
    found = np.asarray(mask.block_map)
    assert not (found & ~visible).any() and (found >= forced).all()
    for place in np.ndindex(2, 3):
        for r, order in enumerate(ranked(scores[place], visible, forced)):
            kept = set(np.flatnonzero(found[place][r]))
            assert kept == set(order[: len(kept)])
            if not order or np.isinf(scores[place][r][order]).all():
                continue
            weight = np.where(visible[r], np.exp(scores[place][r].astype(np.float64)), 0)
            share = weight / weight.sum()
            total, least = sum(share[c] for c in kept), max(int(forced[r].sum()), 1)
            assert total >= mass - 1e-5 or len(kept) == min(capacity, len(order))
            if len(kept) > least:  # one less would not do
                assert total - share[order[len(kept) - 1]] < mass + 1e-5


def test_top_p_of_known_masses():
    shares = jnp.array([0.05, 0.5, 0.15, 0.3])
    scores = jnp.broadcast_to(jnp.log(shares), (1, 1, 4, 4))

    def kept(mass, **kwargs):
        mask = top_p_blocks(scores, (8, 8), (2, 2), mass=mass, sinks=0, local=0, **kwargs)
        return np.flatnonzero(mask.block_map[0, 0, 3]).tolist()

    assert kept(0.0) == [1] and kept(0.49) == [1] and kept(0.51) == [1, 3]
    assert kept(0.9) == [1, 2, 3] and kept(1.0) == [0, 1, 2, 3]
    assert kept(0.1, least=3) == [1, 2, 3]
    assert kept(0.99, capacity=2) == [1, 3]
    per_row = jnp.array([0.4, 0.6, 0.9, 1.0])
    mask = top_p_blocks(scores, (8, 8), (2, 2), mass=per_row, sinks=0, local=0)
    assert mask.by_query.count[0, 0].tolist() == [1, 2, 3, 4]
    forced = top_p_blocks(scores, (8, 8), (2, 2), mass=0.54, sinks=1, local=0)
    assert np.flatnonzero(forced.block_map[0, 0, 0]).tolist() == [0, 1]  # 0.05 + 0.5


def test_nan_is_never_chosen():
    scores = jnp.full((1, 1, 4, 4), jnp.nan).at[..., 1].set(1.0)
    for build in (
        lambda: top_k_blocks(scores, (8, 8), (2, 2), count=3, sinks=0, local=0),
        lambda: top_p_blocks(scores, (8, 8), (2, 2), mass=1.0, sinks=0, local=0),
    ):
        np.testing.assert_array_equal(build().block_map[0, 0], np.arange(4) == np.full((4, 1), 1))


def test_a_count_for_each_head():
    scores = jax.random.normal(jax.random.key(0), (1, 3, 4, 4))
    counts = jnp.array([1, 2, 4])[:, None]
    build = jax.jit(lambda c: top_k_blocks(scores, (8, 8), (2, 2), count=c, sinks=0, local=0))
    mask = build(counts)
    np.testing.assert_array_equal(mask.by_query.count[0], np.broadcast_to(counts, (3, 4)))
    assert mask.by_query.index.shape[-1] == 4


def test_within_another_mask():
    ids = jnp.array([0] * 4 + [1] * 4)
    scores = jnp.broadcast_to(jnp.array([9.0, 0, 9, 1]), (1, 2, 4, 4))
    own = documents(ids, (2, 2)) & causal((8, 8), (2, 2))
    for build in (
        lambda **kw: top_k_blocks(scores, (8, 8), (2, 2), count=2, **kw),
        lambda **kw: top_p_blocks(scores, (8, 8), (2, 2), mass=0.99, **kw),
    ):
        mask = build(within=own, sinks=0)
        assert not np.asarray(mask.todense() & ~own.todense()).any()
        assert np.asarray(mask.block_map)[..., range(4), range(4)].all()
        np.testing.assert_array_equal(mask.by_query.count[0, 0], [1, 2, 1, 2])


@pytest.mark.parametrize("pool", [mean_pool, max_pool])
@pytest.mark.parametrize(("h", "h_kv", "heads"), [(4, 4, 4), (4, 2, 2), (4, 2, 4), (4, 2, 1)])
def test_scores_are_products_of_pools(pool, h, h_kv, heads, key):
    q = jax.random.normal(key, (2, SHAPE[0], h, 8))
    k = jax.random.normal(jax.random.key(1), (2, SHAPE[1], h_kv, 8))
    found = block_scores(q, k, BLOCK, heads=heads, pool=pool)
    assert found.dtype == jnp.float32 and found.shape == (2, heads, ROWS, COLS)
    reduce = np.mean if pool is mean_pool else np.max
    q_, k_ = (
        np.stack([reduce(np.asarray(x)[:, i : i + b], axis=1) for i in range(0, x.shape[1], b)], 1)
        for x, b in zip((q, k), BLOCK, strict=True)
    )
    scores = np.einsum("brhd,bchd->bhrc", q_, k_.repeat(h // h_kv, 2)) / np.sqrt(8)
    want = scores.reshape(2, heads, -1, ROWS, COLS).mean(2)
    np.testing.assert_allclose(found, want, atol=1e-5)
    half = block_scores(
        q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), BLOCK, heads=heads, pool=pool
    )
    np.testing.assert_allclose(half, want, atol=0.05)


def test_the_heaviest_blocks_are_found(key):
    """Where the keys of a block are alike, pooled scores find the blocks that attention wants."""
    blocks, size, d, planted = 16, 8, 32, 3
    centre = jax.random.normal(key, (blocks, d))
    keys = jnp.repeat(centre, size, 0)[None, :, None]
    target = jax.vmap(lambda k: jax.random.permutation(k, blocks)[:planted])(
        jax.random.split(jax.random.key(1), blocks)
    )
    queries = jnp.repeat(centre[target].sum(1), size, 0)[None, :, None]
    noise = jax.random.normal(jax.random.key(2), (2, *keys.shape))
    q, k = queries + 0.5 * noise[0], keys + 0.5 * noise[1]
    shape, block = (blocks * size,) * 2, (size, size)
    everything = BlockMask.from_dense(jnp.ones((blocks, blocks), bool), block)
    _, mass = block_sparse_attention(q, k, k, everything, return_block_mass=True)
    scores = block_scores(q, k, block)
    mask = top_k_blocks(scores, shape, block, count=planted, sinks=0, local=0)
    recall = jnp.sum(jnp.where(mask.block_map, mass, 0), -1).mean()
    best = jnp.sort(mass, -1)[..., -planted:].sum(-1).mean()
    assert float(recall) > 0.97 * float(best) and float(best) > 0.7
    nucleus = top_p_blocks(scores, shape, block, mass=0.9, sinks=0, local=0)
    assert float(jnp.where(nucleus.block_map, mass, 0).sum(-1).mean()) > 0.85
    assert float(nucleus.density()) < 0.5


def test_under_jit_grad_and_vmap(key):
    """One compilation for all data; the choice has no gradient, what it chooses has."""
    shape, block = (16, 16), (4, 4)

    def loss(q, k):
        scores = block_scores(q, k, block)
        mask = top_k_blocks(scores, shape, block, count=2, causal=True)
        mask = mask | top_p_blocks(scores, shape, block, mass=0.5, causal=True)
        out = block_sparse_attention(q, k, k, mask)
        return jnp.sum(out**2), mask

    @fast_jit
    def frozen(q, k, mask):
        return jax.grad(lambda q, k: jnp.sum(block_sparse_attention(q, k, k, mask) ** 2), (0, 1))(
            q, k
        )

    step = fast_jit(jax.vmap(jax.grad(loss, (0, 1), has_aux=True)))
    for seed in range(2):
        q, k = jax.random.normal(jax.random.key(seed), (2, 3, 1, 16, 2, 8))
        gradients, masks = step(q, k)
        for i in range(3):
            mask, found = (jax.tree.map(lambda x, i=i: x[i], tree) for tree in (masks, gradients))
            for one, want in zip(found, frozen(q[i], k[i], mask), strict=True):
                np.testing.assert_allclose(one, want, atol=1e-4)
    assert step._cache_size() == 1


def test_bad_input():
    scores = jnp.zeros((1, 2, 4, 4))
    q = jnp.zeros((1, 8, 4, 8))
    own = causal((8, 8), (2, 2))
    for build, message in (
        (lambda: top_k_blocks(scores, (8, 9), (2, 2), count=2), r"must be \[B or 1, heads, 4, 5\]"),
        (lambda: top_k_blocks(scores, (8, 8), (2, 2), count=1), "no room for 2 forced blocks"),
        (lambda: top_k_blocks(scores, (8, 8), (2, 2), count=2, local=-1), "not be negative"),
        (
            lambda: top_p_blocks(scores, (8, 8), (2, 2), mass=0.5, capacity=3, local=3),
            "capacity=3 has no room for 6",
        ),
        (
            lambda: top_k_blocks(scores, (8, 8), (2, 2), count=2, within=causal((8, 8), (2, 4))),
            "within must be a mask",
        ),
        (
            lambda: top_k_blocks(
                scores, (8, 8), (2, 2), count=2, within=BlockMask.from_heads([own] * 3)
            ),
            "heads of within must divide",
        ),
        (lambda: block_scores(q, q, (2, 2), heads=3), "heads=3 and the heads of k"),
        (lambda: block_scores(q, q[:, :, :3], (2, 2)), "heads of k must divide"),
        (lambda: block_scores(q, q[..., :4], (2, 2)), "agree in batch and width"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
