"""The transformer against plain definitions: what a position may see, RoPE, GQA, scan, sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxsparse.attention import BlockMask, NSASizes, Window, s2, sliding_window
from models.flops import parameter_count, parameter_shapes, training_flops
from models.generate import generate
from models.nsa import NSA
from models.transformer import SIZES, Config, Static, Transformer, rope

CONFIG = Config(
    vocab=31, width=16, layers=2, heads=4, kv_heads=2, head_width=8, hidden=24, context=12
)


forward = nnx.jit(lambda model, x: model(x))


@functools.cache
def made(config):
    return nnx.split(nnx.jit(lambda: Transformer(config, rngs=nnx.Rngs(0)))())


def make(**changes):
    graph, params = made(dataclasses.replace(CONFIG, **changes))
    return nnx.merge(graph, jax.tree.map(jnp.asarray, params))  # variables of its own


def tokens(batch=2, length=12, seed=1):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, CONFIG.vocab)


def loss(model, batch):
    logits = model(batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


gradient = nnx.jit(nnx.grad(loss))


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(), rtol=0)


def test_shapes_paths_and_dtypes():
    logits = forward(make(dtype=jnp.bfloat16), tokens())
    assert logits.shape == (2, 12, 31) and logits.dtype == jnp.float32
    shapes = parameter_shapes(CONFIG)
    assert shapes["embed/embedding"] == (31, 16)
    assert shapes["layers/attention/key/kernel"] == (2, 16, 16)
    assert shapes["layers/mlp/down/kernel"] == (2, 24, 16)
    assert shapes["layers/mlp_norm/scale"] == (2, 16)
    assert shapes["head/kernel"] == (16, 31)
    assert "head/kernel" not in parameter_shapes(dataclasses.replace(CONFIG, tied=True))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(nnx.state(make(dtype=jnp.bfloat16))))


def test_layers_start_different():
    kernel = make().layers.mlp.up.kernel.get_value()
    assert not np.allclose(kernel[0], kernel[1])
    assert np.std(kernel) == pytest.approx(CONFIG.width**-0.5, rel=0.1)


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"dtype": jnp.bfloat16}])
def test_no_position_sees_a_later_one(changes):
    model, x = make(**changes), tokens()
    other = x.at[:, 7].set((x[:, 7] + 1) % CONFIG.vocab)
    before, after = forward(model, x), forward(model, other)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert not np.any(np.all(np.isclose(before[:, 7:], after[:, 7:]), axis=-1))


def test_rope_depends_on_distance_only_and_keeps_length():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    @jax.jit
    def at(x, p):
        return rope(x, p[None], 100.0)

    def score(a, b):
        return float(np.sum(at(q, jnp.array(a)) * at(k, jnp.array(b))))

    assert score(9, 4) == pytest.approx(score(5, 0), rel=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3
    assert np.linalg.norm(at(q, jnp.array(7))) == pytest.approx(np.linalg.norm(q), rel=1e-5)
    np.testing.assert_array_equal(at(q, jnp.array(0)), q)


def test_grouped_queries_are_repeated_keys_and_values():
    grouped, full = make(), make(kv_heads=4)
    state = nnx.state(grouped)
    for name in ("key", "value"):
        kernel = state["layers"]["attention"][name]["kernel"]
        heads = kernel.get_value().reshape(2, 16, 2, 8)
        kernel.set_value(jnp.repeat(heads, 2, axis=2).reshape(2, 16, 32))
    nnx.update(full, state)
    close(forward(full, tokens()), forward(grouped, tokens()))


@pytest.mark.parametrize("changes", [{"unroll": 2}, {"remat": True}])
def test_scan_equals_unrolled_equals_rematerialised(changes):
    plain, other = gradient(make(), tokens()), gradient(make(**changes), tokens())
    jax.tree.map(lambda x, y: close(x, y, 1e-4), plain, other)


def test_scan_equals_a_loop_over_the_layers():
    @nnx.jit
    def loop(model, x):
        graph, stacked = nnx.split(model.layers)
        y = model.embed.embedding.get_value()[x]
        for i in range(CONFIG.layers):
            block = nnx.merge(graph, jax.tree.map(lambda w, i=i: w[i], stacked))
            y = block(y, jnp.arange(x.shape[1]))[0]
        return model.head(model.norm(y))

    close(loop(make(), tokens()), forward(make(), tokens()))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_finite_and_reach_every_parameter(dtype):
    for leaf in jax.tree.leaves(gradient(make(dtype=dtype), tokens())):
        assert np.isfinite(leaf).all() and np.any(leaf != 0)


def test_it_learns_a_repeated_sequence():
    model, batch = make(), jnp.tile(jnp.arange(4), 4)[None, :13]
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(loss)(model, batch)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(40)]
    assert losses[0] > 3 and losses[-1] < 0.1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_heads": 3}, "kv_heads"),
        ({"head_width": 7}, "even head_width"),
        ({"layers": 0}, "layers"),
    ],
)
def test_config_says_what_is_wrong(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("tiny", 0.43),
        ("small", 1.6),
        ("wide", 8.7),
        ("base", 24),
        ("medium", 76),
        ("large", 271),
        ("1b", 970),
    ],
)
def test_named_sizes(name, millions):
    config = SIZES[name]
    assert parameter_count(config) / 1e6 == pytest.approx(millions, rel=0.02)
    d, h, f = config.width, config.hidden, config.head_width
    block = 2 * d * config.heads * f + 2 * d * config.kv_heads * f + 3 * d * h + 2 * d
    assert parameter_count(config) == config.layers * block + 2 * 256 * d + d


def test_flops_of_a_token():
    dense = training_flops(CONFIG)
    assert dense["layers/mlp/up/kernel"] == 6 * 2 * 16 * 24
    assert dense["attention"] == 3 * 2 * 2 * 2 * (4 * 8) * 6.5
    assert "embed/embedding" not in dense
    tied = training_flops(dataclasses.replace(CONFIG, tied=True))
    assert tied["embed/embedding"] == dense["head/kernel"] and sum(tied.values()) == sum(
        dense.values()
    )
    sparse = training_flops(CONFIG, {"layers/mlp/up/kernel": 0.25})
    assert sum(dense.values()) - sum(sparse.values()) == 0.75 * dense["layers/mlp/up/kernel"]
    with pytest.raises(ValueError, match="layers/mlp/upp/kernel"):
        training_flops(CONFIG, {"layers/mlp/upp/kernel": 0.25})


def near(tokens):
    return sliding_window((tokens, tokens), (4, 4), left=4)


def shards(tokens):
    return s2((tokens, tokens), (2, 2), heads=4, stride=2, local=1)


def everything(tokens):
    return BlockMask.from_rule(Window(None, None), (tokens, tokens), (4, 4))


SMALL_NSA = NSASizes(4, 2, 4, count=2, initial=0, local=1, window=3, query_block=2)
KINDS = {"s2": Static(shards), "nsa": NSA(SMALL_NSA, hidden=None)}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_sparse_attention_sees_no_later_token_and_reaches_every_parameter(kind):
    model, x = make(attention=kind), tokens()

    @nnx.jit
    def run(model, x):
        def loss(model):
            logits = model(x)
            return (logits**2).mean(), logits

        return nnx.grad(loss, has_aux=True)(model)

    gradients, before = run(model, x)
    _, after = run(model, x.at[:, 7].set((x[:, 7] + 1) % CONFIG.vocab))
    np.testing.assert_allclose(before[:, :7], after[:, :7], rtol=0, atol=1e-6)
    assert not np.any(np.isclose(before[:, 7], after[:, 7]).all(-1))
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all() and np.any(leaf != 0)


def test_a_static_pattern_has_the_parameters_of_dense_and_lists_all_of_it():
    sparse = make(attention=Static(everything))
    assert parameter_shapes(sparse.config) == parameter_shapes(CONFIG)
    close(forward(sparse, tokens()), forward(make(), tokens()))
    jax.tree.map(
        lambda x, y: close(x, y, 1e-4), gradient(sparse, tokens()), gradient(make(), tokens())
    )


def test_a_window_sees_as_far_as_its_layers_reach():
    model, x = make(attention=Static(near)), tokens()
    before, after = (forward(model, y) for y in (x, x.at[:, 0].add(1)))
    changed = ~np.all(np.isclose(before, after, atol=1e-6), axis=(0, 2))
    assert changed.tolist() == [True] * 9 + [False] * 3  # two layers of a window of 4 before


def dense_nsa(layer, x):
    """What `NSAAttention` should give for x [B, T, D], from its weights, by masks of T x T."""
    c, sizes, (b, t, _) = layer.config, layer.kind.sizes, x.shape
    size, bq = sizes.select_block, sizes.query_block
    f, groups, at = c.head_width, c.heads // c.kv_heads, jnp.arange(t)
    q = rope(layer.query(x).reshape(b, t, c.heads, f), at, c.rope_base)
    k, v = (y(x).reshape(b, t, 3, c.kv_heads, f) for y in (layer.key, layer.value))

    def attend(k, v, seen):
        k, v = (jnp.repeat(y, groups, 2) for y in (k, v))
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / f**0.5
        some = seen.any(-1, keepdims=True)
        p = jax.nn.softmax(jnp.where(seen | ~some, scores, -jnp.inf), -1) * some
        return jnp.einsum("bhts,bshd->bthd", p, v), p

    starts = jnp.arange(0, t - sizes.length + 1, sizes.stride)
    blocks = starts[:, None] + jnp.arange(sizes.length)
    coarse = []
    for y, module in ((k, layer.compress_key), (v, layer.compress_value)):
        chunk = y[:, blocks, 0] + module.position.get_value()[:, None]  # [B, N, l, K, F]
        flat = chunk.swapaxes(2, 3).reshape(b, starts.size, c.kv_heads, -1)
        coarse.append(jax.nn.gelu(flat @ module.up.get_value()) @ module.down.get_value())
    ends = starts + sizes.length - 1
    first, p = attend(rope(coarse[0], ends, c.rope_base), coarse[1], ends <= at[:, None])

    # Tokens that a compressed one and a selection block share, in strides.
    near = jnp.arange(-(-t // size)) * size
    shared = jnp.minimum(ends[:, None] + 1, near + size) - jnp.maximum(starts[:, None], near)
    p = p.reshape(b, c.kv_heads, groups, t, -1).sum(2)[:, :, at - at % bq]  # by the first query
    importance = p @ (jnp.maximum(shared, 0) / sizes.stride)
    own = (at - at % bq) // size
    block = jnp.arange(near.size)
    score = jnp.where(block > own[:, None], -1.0, jnp.where(block == own[:, None], 9.0, importance))
    order = jnp.argsort(-score, -1)[..., : sizes.count]
    hit = (order[..., None] == block).any(-2) & (block <= own[:, None])
    seen = jnp.repeat(jnp.repeat(hit, size, -1)[..., :t], groups, 1) & (at <= at[:, None])
    second = attend(rope(k[:, :, 1], at, c.rope_base), v[:, :, 1], seen)[0]
    window = (at <= at[:, None]) & (at[:, None] - at < sizes.window)
    third = attend(rope(k[:, :, 2], at, c.rope_base), v[:, :, 2], window)[0]
    gates = jax.nn.sigmoid(layer.gate(x)).reshape(b, t, c.heads, 3, 1)
    y = sum(gates[..., i, :] * out for i, out in enumerate((first, second, third)))
    return layer.out(y.reshape(b, t, -1))


def test_nsa_trains_through_our_kernels_as_by_dense_masks():
    model = make(layers=1, attention=NSA(SMALL_NSA, hidden=6))
    graph, stacked = nnx.split(model.layers)
    graph, weights = nnx.split(nnx.merge(graph, jax.tree.map(lambda w: w[0], stacked)).attention)
    x = jnp.asarray(np.random.standard_normal((2, 11, 16)), jnp.float32)
    weight = np.random.standard_normal((2, 11, 16))

    def weighted(attention):
        def run(weights, x):
            out = attention(nnx.merge(graph, weights), x)
            return (out * weight).sum(), out

        return jax.jit(jax.grad(run, (0, 1), has_aux=True))(weights, x)

    got, out = weighted(lambda layer, x: layer(x, jnp.arange(11))[0])
    want, expected = weighted(dense_nsa)
    close(out, expected)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), got, want)


def test_parameters_and_flops_of_sparse_attention():
    config = dataclasses.replace(CONFIG, attention=NSA(SMALL_NSA, hidden=6))
    more = 2 * 2 * (2 * 16 * 16) + 2 * 16 * 3 * 4  # keys and values of two branches, gates
    more += 2 * 2 * (4 * 8 + 4 * 8 * 6 + 6 * 8)  # two compressors a layer
    assert parameter_count(config) == parameter_count(CONFIG) + more
    dense = training_flops(CONFIG)["attention"]
    assert training_flops(dataclasses.replace(CONFIG, attention=Static(near)))[
        "attention"
    ] == pytest.approx(dense / 6.5 * (4 + 8 + 8) / 3)  # blocks of 4: 1, 2 and 2 for 4 queries each
    # (12 - 3) + (12 - 5) + ... compressed, 4 or 8 selected, 4 or 8 of the window.
    seen = (9 + 7 + 5 + 3 + 1) / 12 + 2 * (4 + 8 + 8) / 3
    perceptrons = 5 / 12 * 2 * 2 * (2 * 6 * (4 * 8 + 8))
    assert training_flops(config)["attention"] == pytest.approx(
        3 * 2 * (4 * 4 * 8 * seen + perceptrons)
    )
    pooled = dataclasses.replace(CONFIG, attention=NSA(SMALL_NSA, hidden=None))
    assert training_flops(pooled)["attention"] < training_flops(config)["attention"]


def test_generation_with_sparse_attention_says_that_it_cannot():
    for kind in (Static(near), NSA(SMALL_NSA)):
        with pytest.raises(NotImplementedError, match="serves Dense"):
            generate(make(attention=kind), tokens(length=4), 2, key=jax.random.key(0))
