"""AST's Adam against its formula in numpy, and that the pull is not a part of the first moment."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as jsp
from tests.training.nm_problem import NM24, over_seeds


def test_five_steps_by_hand():
    rng = np.random.default_rng(0)
    w, mask = rng.normal(size=(4, 4)), rng.random((4, 4)) > 0.5
    grads = rng.normal(size=(5, 4, 4))
    tx = optax.chain(
        jsp.masked_adam(decay=lambda t: 0.1 * t, b1=0.8, b2=0.9), optax.scale_by_learning_rate(0.05)
    )
    params = {"w": jnp.asarray(w, jnp.float32), "b": jnp.ones(2)}
    state, plain = tx.init(params), optax.adam(0.05, 0.8, 0.9)
    other, b = plain.init(params["b"]), params["b"]
    mu, nu = np.zeros((4, 4)), np.zeros((4, 4))
    for t, g in enumerate(grads):
        tree = {"w": jnp.asarray(g, jnp.float32), "b": jnp.asarray(g[0, :2], jnp.float32)}
        masks = {"w": jnp.asarray(mask), "b": jnp.array(True)}
        updates, state = jax.jit(tx.update)(tree, state, params, masks=masks)
        params = optax.apply_updates(params, updates)
        mu = 0.8 * mu + 0.2 * g
        d = mu + 0.1 * t * ~mask * w
        nu = 0.9 * nu + 0.1 * d**2
        w = w - 0.05 * d / (1 - 0.8 ** (t + 1)) / (np.sqrt(nu / (1 - 0.9 ** (t + 1))) + 1e-8)
        np.testing.assert_allclose(params["w"], w, rtol=1e-4, atol=1e-6)
        step, other = plain.update(tree["b"], other, b)
        b = optax.apply_updates(b, step)
        np.testing.assert_allclose(params["b"], b, rtol=1e-5)  # Adam where there is no mask
    np.testing.assert_allclose(state[0].mu["w"], mu, rtol=1e-4, atol=1e-6)


def test_sparsify_hands_over_the_masks_also_through_wrappers():
    params = {"w": jnp.array([[4.0, 3, 2, 1]]), "b": jnp.ones(1)}
    adam = jsp.masked_adam(decay=1.0)
    for inner in (
        adam,
        optax.masked(adam, {"w": True, "b": False}),
        optax.multi_transform({"w": adam, "b": optax.sgd(1.0)}, {"w": "w", "b": "b"}),
    ):
        tx = jsp.sparsify(inner, jsp.ste(jsp.uniform(0.5)))
        updates, _ = jax.jit(tx.update)(
            jax.tree.map(jnp.zeros_like, params), tx.init(params), params
        )
        assert (updates["w"] != 0).tolist() == [[False, False, True, True]]


def test_a_rising_pull_settles_the_masks():
    """The claim of annealing SR-STE: explore first, settle later."""
    ramp = optax.linear_schedule(0, 1e-2, 300)
    inner = optax.chain(jsp.masked_adam(decay=ramp), optax.scale_by_learning_rate(3e-3))
    pulled, flips, *_ = over_seeds(jsp.ste(NM24), inner=inner)
    free, unsettled, *_ = over_seeds(jsp.ste(NM24))
    assert (flips[:, 200:].mean(1) < 0.7 * unsettled[:, 200:].mean(1)).all()
    assert pulled.mean() < free.mean()


def test_what_is_missing_is_named():
    params = {"w": jnp.ones((2, 2))}
    adam = jsp.masked_adam(decay=0.1)
    with pytest.raises(ValueError, match="use it inside jsp.sparsify"):
        adam.update(params, adam.init(params), params)
    with pytest.raises(ValueError, match="must be >= 0; got -1"):
        jsp.masked_adam(decay=-1)
