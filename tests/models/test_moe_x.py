"""MoE-X: one wide sparse MLP, and experts chosen for sparsity are sparser."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxsparse import moe, nn
from models.moe_x import Config, MoEX

CONFIG = Config(width=16, hidden=32, experts=8)
X = jax.random.normal(jax.random.key(0), (256, 16))


def test_experts_side_by_side_are_one_wide_mlp():
    layer = MoEX(CONFIG, rngs=nnx.Rngs(0))
    y, routing = layer(X)
    read = layer.read(X)
    wide = layer.decode[...].reshape(-1, 16)
    np.testing.assert_allclose(y, read.hidden @ wide, atol=1e-5)
    idle = np.ones((256, 8), bool)
    np.put_along_axis(idle, np.asarray(routing.experts), False, 1)
    assert not np.any(np.asarray(read.hidden).reshape(256, 8, 32)[idle])


@pytest.mark.parametrize("steps", [0, 40])
def test_experts_chosen_for_sparsity_have_sparser_hidden_units(steps):
    """The paper's claim in miniature: at random weights, and after training on the same task."""
    target = jnp.tanh(X @ jax.random.normal(jax.random.key(1), (16, 16)))
    density = {}
    for name, router, gate in (
        ("sparsity", moe.token_choice(2), moe.sparsity_gate()),
        ("learned", moe.token_choice(2), moe.linear_gate()),
        ("random", moe.random(2), moe.sparsity_gate()),
    ):
        config = dataclasses.replace(CONFIG, router=router, gate=gate)
        graph, params = nnx.split(MoEX(config, rngs=nnx.Rngs(2)))
        tx = optax.adam(1e-2)

        def loss(params, key, graph=graph):
            y, routing = nnx.merge(graph, params)(X, key=key)
            return jnp.mean((y - target) ** 2) + routing.aux

        @jax.jit
        def step(params, state, key, loss=loss, tx=tx):
            updates, state = tx.update(jax.grad(loss)(params, key), state)
            return optax.apply_updates(params, updates), state

        state, begin = tx.init(params), loss(params, jax.random.key(3))
        for i in range(steps):
            params, state = step(params, state, jax.random.key(i))
        assert steps == 0 or loss(params, jax.random.key(3)) < 0.8 * begin
        density[name] = float(nnx.merge(graph, params).read(X, key=jax.random.key(4)).density)
    assert density["sparsity"] < 0.9 * min(density["learned"], density["random"])


def test_in_a_gated_layer_the_gate_sees_what_is_under_the_activation():
    gate, router = moe.sparsity_gate(), moe.token_choice(1)
    layer = nn.MoE(16, 32, 8, router, gate=gate, activation=jax.nn.relu, rngs=nnx.Rngs(0))
    said, other = (gate.logits({}, X, w[...]).argmax(-1) for w in (layer.gate, layer.up))
    np.testing.assert_array_equal(layer.route(X).experts[:, 0], said)
    assert np.any(said != other)
