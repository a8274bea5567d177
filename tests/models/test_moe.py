"""The language model of experts: what it computes, its cache, its routers and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxsparse as jsp
from models import transformer
from models.generate import generate
from models.moe import SIZES, Config, MoETransformer

TINY = Config(
    width=32, layers=2, heads=2, kv_heads=1, head_width=16, hidden=24, experts=4, chosen=2,
    shared=16, context=16, unroll=2,
)  # fmt: skip
TOKENS = jax.random.randint(jax.random.key(1), (2, 16), 0, 256)


@pytest.fixture(scope="module")
def model():
    return MoETransformer(TINY, rngs=nnx.Rngs(0))


def test_sizes_are_as_said():
    said = {"tiny": 0.6e6, "small": 5.1e6, "base": 112e6, "1b-7b": 6.7e9}
    for name, config in SIZES.items():
        made = nnx.eval_shape(lambda c=config: MoETransformer(c, rngs=nnx.Rngs(0)))
        count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(made, nnx.Param)))
        assert count == pytest.approx(said[name], rel=0.02)


def test_the_cache_gives_what_the_whole_text_gives(model):
    whole = nnx.jit(lambda m, t: m(t)[0])(model, TOKENS)
    cache = model.empty_cache(2, 16)
    step = nnx.jit(lambda m, t, p, c: m.apply(t, p, c))
    first, cache = step(model, TOKENS[:, :15], jnp.arange(15), cache)
    last, _ = step(model, TOKENS[:, 15:], jnp.arange(15, 16), cache)
    np.testing.assert_allclose(jnp.concatenate([first, last], 1), whole, atol=2e-4)


def test_one_expert_that_always_runs_is_the_dense_model():
    config = Config(
        width=32, layers=2, heads=2, kv_heads=1, head_width=16, hidden=24, experts=1, chosen=1,
        shared=0, context=16,
    )  # fmt: skip
    one = MoETransformer(config, rngs=nnx.Rngs(0))
    dense = transformer.Transformer(config.active, rngs=nnx.Rngs(1))
    for name in ("embed", "norm", "head"):
        nnx.update(getattr(dense, name), nnx.state(getattr(one, name)))
    for name in ("attention_norm", "attention"):
        nnx.update(getattr(dense.layers, name), nnx.state(getattr(one.layers, name)))
    nnx.update(dense.layers.mlp_norm, nnx.state(one.layers.moe_norm))
    for name in ("gate", "up", "down"):
        weight = getattr(one.layers.moe, name)[...][:, 0]
        getattr(dense.layers.mlp, name).kernel.set_value(weight)
    got, want = (nnx.jit(lambda m, t: m(t))(m, TOKENS) for m in (one, dense))
    np.testing.assert_allclose(got[0], want, atol=1e-4)


def test_experts_layers_and_router_get_gradients_and_loss_falls(model):
    import optax

    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        logits, routed = nnx.merge(graph, params, rest)(TOKENS)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:])
        return losses.mean() + routed.aux.sum()

    tx = optax.adam(3e-3)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, value, grads

    _, _, first, grads = step(params, state)
    for leaf in jax.tree.leaves(grads):
        assert np.any(leaf) and np.all(np.isfinite(leaf))
    for _ in range(15):
        params, state, value, _ = step(params, state)
    assert value < first - 1


def test_routers_with_a_state_take_a_step_in_every_layer():
    import dataclasses

    config = dataclasses.replace(TINY, router=jsp.moe.loss_free(2, rate=0.1))
    model = MoETransformer(config, rngs=nnx.Rngs(0))
    _, routed = nnx.jit(lambda m, t: m(t))(model, TOKENS)
    model.update_routers(routed.statistics)
    bias = model.layers.moe.state.get_value()
    busy = routed.statistics.load > 0.25
    np.testing.assert_array_equal(bias < 0, busy)


def test_hashing_sees_the_tokens_and_text_is_generated():
    import dataclasses

    config = dataclasses.replace(TINY, router=jsp.moe.hashed(2))
    model = MoETransformer(config, rngs=nnx.Rngs(0))
    _, routed = nnx.jit(lambda m, t: m(t))(model, TOKENS)
    assert np.any(routed.routing.experts[0, 0] != routed.routing.experts[0, 1])
    np.testing.assert_array_equal(routed.routing.experts[0], routed.routing.experts[1])
    text = generate(model, TOKENS[:, :4], 3, key=jax.random.key(0), temperature=0)
    want = jnp.argmax(model.apply(text[:, :-1], jnp.arange(6))[0][:, 3:], -1)
    np.testing.assert_array_equal(text[:, 4:], want)
