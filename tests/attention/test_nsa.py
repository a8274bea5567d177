"""Native sparse attention against its equations, written with loops and dense masks."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.attention import (
    KeyValue,
    MLPCompressor,
    NSASizes,
    PoolCompressor,
    all_queries,
    compress,
    compressed_attention,
    first_query,
    nsa_attention,
)

SIZES = NSASizes(
    length=8, stride=4, select_block=8, count=3, initial=1, local=1, window=10, query_block=4
)
B, T, H, K, D = 2, 45, 4, 2, 8  # the last block of everything is ragged


def arrays(tokens=T, dtype=jnp.float32, seed=0):
    """(q, three keys and values, gates, weights of two compressors)."""
    random = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape), dtype)

    q = normal(B, tokens, H, D)
    branches = [KeyValue(normal(B, tokens, K, D), normal(B, tokens, K, D)) for _ in range(3)]
    mlp = MLPCompressor(normal(8, D), normal(8 * D, 16) / 8, normal(16, D) / 4)
    pool = PoolCompressor(normal(8, D), normal(D), normal(8))
    gates = jnp.asarray(random.uniform(size=(B, tokens, H, 3)), dtype)
    return q, branches, gates, KeyValue(mlp, pool)


def shortened(sizes):
    return partial(compress, length=sizes.length, stride=sizes.stride)


def ours(q, branches, gates, compressors, sizes=SIZES, **options):
    coarse = KeyValue(*map(shortened(sizes), branches[0], compressors))
    return nsa_attention(q, coarse, *branches[1:], gates, sizes=sizes, **options)


def softmax(q, k, v, seen):
    """Attention [B, T, H, D] under a mask that broadcasts to [B, H, T, S], and probabilities."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    any_ = seen.any(-1, keepdims=True)
    p = jax.nn.softmax(jnp.where(seen | ~any_, scores, -jnp.inf), -1) * any_
    return jnp.einsum("bhts,bshd->bthd", p, v), p


def compressed_by_loop(x, function, sizes):
    starts = range(0, x.shape[1] - sizes.length + 1, sizes.stride)
    windows = [x[:, s : s + sizes.length].swapaxes(1, 2) for s in starts]
    return jnp.stack([function(window) for window in windows], 1)


def chosen_by_loop(p, tokens, sizes):
    """Bool [B, K, T, T]: the tokens of the selected blocks, from probabilities [B, H, T, N]."""
    size, blocks = sizes.select_block, -(-tokens // sizes.select_block)
    p = np.asarray(p).reshape(B, K, H // K, tokens, -1).sum(2)
    seen = np.zeros((B, K, tokens, tokens), bool)
    for b, k, t in np.ndindex(B, K, tokens):
        first = t - t % sizes.query_block
        last = min(first + sizes.query_block, tokens) - 1
        importance = np.zeros(blocks)
        for j in range(blocks):
            mine = set(range(j * size, (j + 1) * size, sizes.stride))
            for i, value in enumerate(p[b, k, first]):
                strides = range(i * sizes.stride, i * sizes.stride + sizes.length, sizes.stride)
                importance[j] += value * len(mine & set(strides))
            if j < sizes.initial or first // size - sizes.local < j <= last // size:
                importance[j] = np.inf
        allowed = np.arange(blocks) <= last // size
        best = np.argsort(np.where(allowed, -importance, np.inf), kind="stable")[: sizes.count]
        for j in best[allowed[best]]:
            seen[b, k, t, j * size : (j + 1) * size] = True
    return seen & np.tri(tokens, dtype=bool)


def reference(q, branches, gates, compressors, sizes, seen):
    """By dense masks; `seen` [B, H, T, T] is what the selected branch sees."""
    tokens = q.shape[1]
    coarse = [
        compressed_by_loop(x, f, sizes) for x, f in zip(branches[0], compressors, strict=True)
    ]
    at = np.arange(tokens)
    ends = np.arange(coarse[0].shape[1]) * sizes.stride + sizes.length - 1
    near = (at[:, None] >= at) & (at[:, None] - at < sizes.window)
    outs = [
        softmax(q, *coarse, ends <= at[:, None])[0],
        softmax(q, *branches[1], seen)[0],
        softmax(q, *branches[2], near)[0],
    ]
    return sum(gates[..., i : i + 1] * out for i, out in enumerate(outs))


def coarse_probabilities(q, branches, compressors, sizes):
    coarse = [
        compressed_by_loop(x, f, sizes) for x, f in zip(branches[0], compressors, strict=True)
    ]
    ends = np.arange(coarse[0].shape[1]) * sizes.stride + sizes.length - 1
    return softmax(q, *coarse, ends <= np.arange(q.shape[1])[:, None])[1]


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-3))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"query_block": 1, "initial": 0},
        {"stride": 8, "select_block": 8, "query_block": 16, "initial": 0, "window": 2},
    ],
    ids=["shared by 4", "a token", "no overlap, queries over two blocks"],
)
def test_outputs_and_gradients_are_those_of_the_equations(changes):
    sizes, args = dataclasses.replace(SIZES, **changes), arrays()
    q, branches, gates, compressors = args
    p = jax.jit(partial(coarse_probabilities, sizes=sizes))(q, branches, compressors)
    seen = np.repeat(chosen_by_loop(p, T, sizes), H // K, 1)
    weight = np.random.standard_normal(q.shape)

    def weighted(f):
        def run(args):
            out, mask = f(*args)
            return (out * weight).sum(), (out, mask)

        return jax.jit(jax.grad(run, has_aux=True))(args)

    got, (out, mask) = weighted(partial(ours, sizes=sizes, return_block_mask=True))
    want, (expected, _) = weighted(lambda *args: (reference(*args, sizes, seen), None))
    np.testing.assert_array_equal(np.repeat(mask.todense(), H // K, 1), seen)
    close(out, expected)

    pairs = mask.by_query.count.mean((0, 1)).sum() * sizes.query_block * sizes.select_block
    keys = sizes.keys_seen(T)
    assert keys["selected"] == pytest.approx(float(pairs) / T)
    assert keys["compressed"] == (sizes.ends(T) <= np.arange(T)[:, None]).sum() / T
    assert sizes.window <= keys["window"] <= sizes.window + 2 * sizes.select_block

    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.any(b != 0)
        close(a, b, 1e-4)


def test_selecting_everything_is_dense_attention():
    q, branches, gates, compressors = arrays()
    sizes = dataclasses.replace(SIZES, count=6)
    only = jnp.zeros_like(gates).at[..., 1].set(1)
    out = jax.jit(partial(ours, sizes=sizes))(q, branches, only, compressors)
    close(out, jax.nn.dot_product_attention(q, *branches[1], is_causal=True))


@pytest.mark.parametrize("query_block", [1, 16])
def test_no_output_depends_on_a_later_token(query_block):
    sizes = dataclasses.replace(SIZES, query_block=query_block, count=4)
    run = jax.jit(partial(ours, sizes=sizes))
    args, other = arrays(), arrays(seed=1)
    *now, weights = args
    before = np.asarray(run(*args))
    for p in (1, 7, 18, 30, 44):  # inside and at the ends of blocks of all kinds
        later = jax.tree.map(lambda x, y, p=p: x.at[:, p:].set(y[:, p:]), now, list(other[:3]))
        after = np.asarray(run(*later, weights))
        close(after[:, :p], before[:, :p], 1e-6)
        assert not np.any(np.all(np.isclose(after[:, p:], before[:, p:]), -1))


def test_all_queries_lets_the_choice_look_ahead_and_one_query_cannot():
    args = arrays()
    shared = dataclasses.replace(SIZES, query_block=4, importance=all_queries)
    run = jax.jit(partial(ours, sizes=shared))
    moved, before = np.zeros(38), np.asarray(run(*args))
    for shift in range(8):  # other queries 38 and 39, of the block 36 to 39
        later = args[0].at[:, 38:].set(100 * jnp.roll(args[0], shift, 1)[:, 38:])
        moved += np.abs(run(later, *args[1:]) - before)[:, :38].max((0, 2, 3))
    assert moved[36:].max() > 1e-3 and moved[:36].max() < 1e-6
    p = np.random.standard_normal((2, 1, 3))
    np.testing.assert_array_equal(all_queries(p), first_query(p))


def test_a_needle_is_found_far_away():
    """One key far behind answers the query: its block is selected, and the value comes back."""
    tokens, at = 128, 37
    sizes = NSASizes(8, 8, 8, count=2, initial=0, local=1, window=8, query_block=1)
    noise = jax.random.normal(jax.random.key(0), (B, tokens, K, D))
    direction = jnp.eye(D)[0] * 20
    keys = (noise / 10).at[:, at].set(direction)
    values = noise.at[:, at].set(5.0)
    q = jnp.broadcast_to(direction, (B, tokens, H, D))
    coarse = KeyValue(*(shortened(sizes)(x, lambda x: x.mean(-2)) for x in (keys, values)))
    near = KeyValue(keys, values)
    gates = jnp.zeros((B, tokens, H, 3)).at[..., 1].set(1)
    run = jax.jit(partial(nsa_attention, sizes=sizes, return_block_mask=True))
    out, mask = run(q, coarse, near, near, gates)
    assert mask.block_map[:, :, at + 8 :, at // 8].all()
    close(out[:, at + 8 :], jnp.full((B, tokens - at - 8, H, D), 5.0), 1e-3)
    window, _ = run(q, coarse, near, near, jnp.roll(gates, 1, -1))
    assert np.abs(window[:, at + 8 :] - 5).min() > 1  # out of the reach of the window


@pytest.mark.parametrize("tokens", [1, 8])
def test_short_inputs_have_no_compressed_token_and_no_nan(tokens):
    args = arrays(tokens)
    q, branches, gates, compressors = args
    only = jnp.zeros_like(gates).at[..., 2].set(1)

    @jax.jit
    def run(args):
        def loss(args):
            out = ours(*args)
            return (out**2).sum(), out

        return jax.grad(loss, has_aux=True)(args)

    gradients, out = run((q, branches, only, compressors))
    chex.assert_tree_all_finite(gradients)
    close(out, jax.nn.dot_product_attention(q, *branches[2], is_causal=True))


def test_the_first_tokens_see_no_compressed_one():
    q, branches, _, compressors = arrays()
    coarse = list(map(shortened(SIZES), branches[0], compressors))
    out, importance = compressed_attention(q, *coarse, SIZES)
    assert not np.any(out[:, : SIZES.length - 1]) and np.all(np.any(out[:, 7:] != 0, -1))
    assert not np.any(importance[:, :, 0]) and importance.shape == (B, K, 12, 6)
    # A row has the probability 1 of each query head, as often as the overlap counts it.
    np.testing.assert_allclose(importance[:, :, 2:].sum(-1), 2 * H // K, rtol=1e-5)


def test_bf16_vmap_and_one_compilation():
    low = arrays(dtype=jnp.bfloat16)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    run = jax.jit(partial(ours, sizes=dataclasses.replace(SIZES, count=6)))  # no choice to round
    out = run(*low)
    assert out.dtype == jnp.bfloat16
    close(out.astype(jnp.float32), run(*exact), 3e-2)

    run = jax.jit(chex.assert_max_traces(ours, n=1))
    each = [arrays(), arrays(seed=1)]
    outs = [run(*args) for args in each]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *each)
    close(jax.jit(jax.vmap(ours))(*stacked), jnp.stack(outs))


def test_memory_grows_with_tokens_not_with_pairs():
    sizes = NSASizes(32, 16, 64, count=4, window=64, query_block=16)

    def need(tokens):
        x = jax.ShapeDtypeStruct((1, tokens, 1, 16), jnp.float32)
        gates = jax.ShapeDtypeStruct((1, tokens, 1, 3), jnp.float32)

        def loss(x, gates):
            coarse = shortened(sizes)(x, lambda x: x.mean(-2))
            coarse = KeyValue(coarse, coarse)
            out = nsa_attention(x, coarse, KeyValue(x, x), KeyValue(x, x), gates, sizes=sizes)
            return out.sum()

        run = jax.jit(jax.grad(loss)).lower(x, gates).compile()
        return run.memory_analysis().temp_size_in_bytes

    small, large = need(2048), need(8192)
    assert large < 8 * small
    assert large < 8192 * 8192 / 16 * 4  # less than the probabilities of the compressed branch


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"length": 6}, "length to be a multiple of stride; got 6, 4"),
        ({"select_block": 6}, "select_block to be a multiple of stride"),
        ({"count": 1}, "count >= initial"),
        ({"local": 0}, "local >= 1; got 0"),
        ({"window": 0}, "window >= 1"),
    ],
)
def test_sizes_say_what_is_wrong(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SIZES, **changes)


def test_attention_says_what_is_wrong():
    q, branches, gates, compressors = arrays()
    with pytest.raises(ValueError, match="gates must be"):
        ours(q, branches, gates[..., :2], compressors)
    with pytest.raises(ValueError, match="45 tokens make 10 compressed ones"):
        nsa_attention(q, *branches, gates, sizes=SIZES)
    with pytest.raises(ValueError, match="length must be a multiple of stride; got 6 and 4"):
        compress(q, lambda x: x.mean(-2), length=6, stride=4)
    with pytest.raises(ValueError, match="no room for"):
        ours(*arrays(), sizes=dataclasses.replace(SIZES, query_block=32))
