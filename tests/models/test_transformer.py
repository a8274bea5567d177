"""The transformer against plain definitions: what a position may see, RoPE, GQA, scan, sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from models.flops import parameter_count, parameter_shapes, training_flops
from models.transformer import SIZES, Config, Transformer, rope

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
