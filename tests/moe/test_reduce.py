"""What experts are worth, and models of fewer experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsparse import moe
from models.moe import Config, MoETransformer
from pallas_kernels import grouped_matmul

AXES = {f"layers/moe/{name}": -3 for name in ("gate", "up", "down")}
AXES["layers/moe/router/kernel"] = -1
CONFIG = Config(
    width=32, layers=2, heads=2, kv_heads=1, head_width=16, hidden=24, experts=4, chosen=2,
    shared=16, context=16, router=moe.among(moe.token_choice(2)),
)  # fmt: skip
TOKENS = jax.random.randint(jax.random.key(0), (2, 8), 0, 256)
RUN = nnx.jit(lambda model: model(TOKENS))


def test_usage_against_a_loop():
    x = jax.random.normal(jax.random.key(0), (10, 3))
    w = jax.random.normal(jax.random.key(1), (4, 3, 5))
    routing = moe.top_p(0.6, 3).route(jax.random.normal(jax.random.key(2), (10, 4)), ())
    seen = moe.usage(x, routing, 4, lambda rows, sizes: grouped_matmul(rows, w, sizes))
    hits, weight, output = np.zeros((3, 4))
    for t in range(10):
        for g, e in zip(
            np.asarray(routing.weights[t]), np.asarray(routing.experts[t]), strict=True
        ):
            if e < 4:
                hits[e] += 1
                weight[e] += g
                output[e] += g * np.linalg.norm(x[t] @ w[e])
    for got, want in zip(seen[1:], (hits, weight, output), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(moe.proficiency(seen), (weight + hits) / 10, rtol=1e-5)
    np.testing.assert_allclose(moe.expert_saliency(seen), output / np.maximum(hits, 1), rtol=1e-5)


def test_layers_keep_unequal_numbers_and_dead_experts_never_run():
    model = MoETransformer(CONFIG, rngs=nnx.Rngs(0))
    alive = jnp.array([[True, True, False, True], [False, True, False, False]])
    model.layers.moe.state.set_value(((), alive))
    _, routed = RUN(model)
    assert not np.any(np.asarray(routed.statistics.load)[~np.asarray(alive)])
    assert float(routed.statistics.choices[1]) == 1.0  # one expert is left there
    grads = nnx.grad(lambda m: m(TOKENS)[0].sum())(model)["layers"]["moe"]["up"].get_value()
    assert np.all(np.isfinite(grads))
    np.testing.assert_array_equal(np.any(grads, (2, 3)) <= alive, True)


def test_survivors_end_with_the_best_expert_of_every_layer():
    scores = jnp.array([[0.5, 0.4, 0.1, 0.5], [0.1, 0.9, 0.8, 0.0]])
    alive = jnp.ones((2, 4), bool)
    for threshold in (0.0, 0.3, 0.85, 1.0):
        now = moe.survivors(scores, alive, threshold)
        assert np.all(now <= alive) and np.all(now.any(-1))
        alive = now
    np.testing.assert_array_equal(alive, [[1, 0, 0, 0], [0, 1, 0, 0]])
    dead = jnp.array([[True, False, True, True]])
    np.testing.assert_array_equal(moe.survivors(scores[:1], dead, 0.5), [[1, 0, 0, 1]])


def test_slicing_gives_what_masking_gives():
    model = MoETransformer(CONFIG, rngs=nnx.Rngs(0))
    keep = jnp.array([[0, 2, 3], [3, 1, 0]])
    alive = jax.nn.one_hot(keep, 4, dtype=bool).any(1)
    model.layers.moe.state.set_value(((), alive))
    want = RUN(model)[0]
    small = MoETransformer(dataclasses.replace(CONFIG, experts=3), rngs=nnx.Rngs(1))
    nnx.update(small, moe.take_experts(nnx.state(model, nnx.Param), keep, AXES))
    np.testing.assert_allclose(RUN(small)[0], want, atol=2e-5)


def test_merging_twins_changes_nothing():
    normalized = dataclasses.replace(CONFIG, router=moe.token_choice(4))
    model = MoETransformer(normalized, rngs=nnx.Rngs(0))
    layer = model.layers.moe
    for weight in (layer.gate, layer.up, layer.down):
        weight.set_value(weight[...].at[:, 2].set(weight[...][:, 0]))
    kernel = layer.router["kernel"]
    kernel.set_value(kernel[...].at[..., 2].set(kernel[...][..., 0]))
    groups = jnp.array([[0, 1, 0, 2], [0, 1, 0, 2]])
    x = jax.random.normal(jax.random.key(3), (12, 32))
    logits = x @ kernel[...][0]
    assert moe.alike(logits, 3).tolist() == [0, 1, 0, 2]
    merged = moe.merge_experts(nnx.state(model, nnx.Param), groups, 3, jnp.ones((2, 4)), AXES)
    for name in ("gate", "up", "down"):
        got, want = (p["layers"]["moe"][name].get_value() for p in (merged, nnx.state(model)))
        np.testing.assert_allclose(got, want[:, jnp.array([0, 1, 3])], atol=1e-6)


def test_a_weighted_mean_by_hand():
    up = {"up": jnp.array([[1.0, 3.0, 7.0]])}
    got = moe.merge_experts(up, jnp.array([[0, 0, 1]]), 2, jnp.array([[3.0, 1.0, 0.0]]), {"up": -1})
    np.testing.assert_allclose(got["up"], [[1.5, 7.0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moe.take_experts({"up": jnp.ones(3)}, jnp.array([3]), {"up": 0}), "0 to 2"),
        (lambda: moe.take_experts({"up": jnp.ones(3)}, jnp.array([1]), {"pu": 0}), "Near: up"),
        (lambda: moe.alike(jnp.ones((2, 3)), 4), "1 <= count <= 3"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_saliency_is_the_error_of_silencing_an_expert():
    """What REAP rests on: the mean over its tokens of what is lost with the expert."""
    key = jax.random.split(jax.random.key(4), 3)
    x = jax.random.normal(key[0], (64, 8))
    w = jax.random.normal(key[1], (4, 8, 8)) * jnp.linspace(0.1, 2.0, 4)[:, None, None]
    routing = moe.token_choice(2).route(x @ jax.random.normal(key[2], (8, 4)), ())

    @jax.jit
    def out(w):
        run = lambda rows, sizes: grouped_matmul(rows, w, sizes)  # noqa: E731
        return moe.apply_experts(x, routing, 4, run), moe.usage(x, routing, 4, run)

    whole, seen = out(w)
    lost = [jnp.linalg.norm(whole - out(w.at[e].set(0))[0], axis=1).sum() for e in range(4)]
    np.testing.assert_allclose(moe.expert_saliency(seen), jnp.array(lost) / seen.hits, rtol=1e-4)
