"""STEP: Adam until the switch, a fixed second moment after it."""

import jax
import numpy as np
import optax
import pytest

import jaxsparse as jsp
from tests.training.nm_problem import NM24, over_seeds


def test_it_is_adam_and_then_its_second_moment_stands_still():
    grads = jax.random.normal(jax.random.key(0), (6, 5))
    tx, adam = jsp.frozen_adam(switch=3, b1=0.8, b2=0.9), optax.scale_by_adam(0.8, 0.9)
    state, other = tx.init(grads[0]), adam.init(grads[0])
    for t in range(6):
        updates, state = tx.update(grads[t], state)
        if t < 3:
            same, other = adam.update(grads[t], other)
            np.testing.assert_allclose(updates, same, rtol=1e-5)
            nu = state.nu
        else:
            np.testing.assert_array_equal(state.nu, nu)
            want = state.mu / (1 - 0.8 ** (t + 1)) / (np.sqrt(nu / (1 - 0.9**3)) + 1e-8)
            np.testing.assert_allclose(updates, want, rtol=1e-5)
    with pytest.raises(ValueError, match="switch >= 1 steps; got 0"):
        jsp.frozen_adam(switch=0)


def test_masks_begin_at_the_switch():
    """The two halves of STEP together: dense and learning the variance, then neither."""
    updater = jsp.dense_when(jsp.ste(NM24), lambda step: step < 20)
    inner = optax.chain(jsp.frozen_adam(switch=20), optax.scale_by_learning_rate(3e-3))
    *_, before = over_seeds(updater, inner=inner, steps=20)
    _, _, params, after = over_seeds(updater, inner=inner, steps=40)
    jax.tree.map(np.testing.assert_array_equal, after.inner[0].nu, before.inner[0].nu)
    view = jax.vmap(updater.view)(params, after.updater)["up"]
    np.testing.assert_array_equal((view != 0).mean((1, 2)), 0.5)
