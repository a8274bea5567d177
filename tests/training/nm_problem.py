"""A small regression for the claims of N:M training: half a second a run on a CPU."""

import jax
import jax.numpy as jnp
import optax

import jaxsparse as jsp
from tests.conformance.lists import fast_jit

NM24 = jsp.uniform(0.5, jsp.NM(2, 4))
SEEDS = jnp.arange(4)


def problem(seed):
    """x [128, 16], y [128, 4] of a network of 8 hidden units, and weights of one with 32."""
    keys = jax.random.split(jax.random.key(seed), 5)
    shapes = (128, 16), (16, 8), (8, 4), (16, 32), (32, 4)
    x, a, b, up, down = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    y = jnp.tanh(x @ a / 4) @ b / jnp.sqrt(8.0)
    return x, y, {"up": up / 4, "down": down / jnp.sqrt(32.0)}


def loss_of(params, x, y, matmul=jnp.matmul):
    hidden = jax.nn.relu(matmul(x, params["up"]))
    return jnp.mean(jnp.square(matmul(hidden, params["down"]) - y))


def train(updater, seed, *, steps=300, inner=None, matmul=None):
    """Loss of the view after some steps, flip rate of each step, weights and state.

    `matmul(x, w, key)` takes the place of `x @ w` in training.
    """
    x, y, params = problem(seed)
    tx = jsp.sparsify(optax.adam(3e-3) if inner is None else inner, updater)

    def step(carry, t):
        params, state = carry
        key = jax.random.fold_in(jax.random.key(9), t)
        rows = jax.random.randint(key, (32,), 0, 128)

        def loss(params):
            view = updater.view(params, state.updater)
            product = jnp.matmul if matmul is None else lambda a, b: matmul(a, b, key)
            return loss_of(view, x[rows], y[rows], product)

        updates, new = tx.update(jax.grad(loss)(params), state, params)
        flips = jsp.churn(state.updater.masks, new.updater.masks)
        return (optax.apply_updates(params, updates), new), flips

    (params, state), flips = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))
    return loss_of(updater.view(params, state.updater), x, y), flips, params, state


def over_seeds(updater, **options):
    """`train` for four seeds at once."""
    return fast_jit(jax.vmap(lambda seed: train(updater, seed, **options)))(SEEDS)
