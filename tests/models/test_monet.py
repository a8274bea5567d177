"""Monet against its n^2 experts, one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.monet import Config, Horizontal, Vertical

CONFIG = Config(width=6, hidden=4, pieces=5, heads=2, chosen=2)
X = jax.random.normal(jax.random.key(0), (7, 6))


def filled(kind):
    """A layer whose biases are not zero."""
    layer = kind(CONFIG, rngs=nnx.Rngs(0))
    for i, name in enumerate(("up_bias", "down_bias")):
        bias = getattr(layer, name)
        bias.set_value(jax.random.normal(jax.random.key(i + 1), bias.shape))
    return layer


def act(x):
    return np.maximum(x, 0) ** 2


def horizontal(layer, x, i, j):
    up, b, down, c = (
        np.asarray(w[...]) for w in (layer.up, layer.up_bias, layer.down, layer.down_bias)
    )
    return act(x @ up[i] + b[i]) @ down[j] + c[j]


def vertical(layer, x, i, j):
    up, b, down, c = (
        np.asarray(w[...]) for w in (layer.up, layer.up_bias, layer.down, layer.down_bias)
    )
    hidden = np.concatenate([act(x @ up[0, i] + b[0, i]), act(x @ up[1, j] + b[1, j])])
    first = np.concatenate([down[0, 0, i], down[0, 1, i]])  # both hidden halves, of expert i
    second = np.concatenate([down[1, 0, j], down[1, 1, j]])
    return np.concatenate([hidden @ first + c[0, i], hidden @ second + c[1, j]])


@pytest.mark.parametrize(("kind", "expert"), [(Horizontal, horizontal), (Vertical, vertical)])
def test_against_all_experts_one_by_one(kind, expert):
    layer = filled(kind)
    mix = layer.router(X)
    p, q = (np.asarray(w) for w in mix[:2])
    np.testing.assert_array_equal((p > 0).sum(-1), 2)
    want = np.zeros((7, 6))
    for t in range(7):
        for i in range(5):
            for j in range(5):
                weight = (p[t, :, i] * q[t, :, j]).sum()
                want[t] += weight * expert(layer, np.asarray(X[t]), i, j) if weight else 0
    got = jax.jit(lambda x: layer(x)[0])(X)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [Horizontal, Vertical])
def test_four_times_the_experts_for_twice_the_parameters(kind):
    def size(pieces):
        made = nnx.eval_shape(lambda: kind(Config(pieces=pieces), rngs=nnx.Rngs(0)))
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(made)))

    assert size(64) == 2 * size(32)  # 4096 experts, 1024 experts


def test_all_parts_get_gradients_and_losses_see_an_uneven_router():
    layer = filled(Horizontal)
    grads = nnx.grad(lambda m: jnp.sum(m(X)[0] ** 2) + m(X)[1])(layer)
    assert all(np.any(leaf) and np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
    keys = layer.router.keys
    even = layer(X)[1]
    keys.set_value(keys[...].at[..., 0].set(9.0 * jnp.ones((2, 6, 2))))  # one piece or none
    assert layer(jnp.abs(X))[1] > even
    with pytest.raises(ValueError, match="chosen <= pieces"):
        Config(pieces=3, chosen=4)
