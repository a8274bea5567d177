"""Mask decay: its view and gradient by hand, and that fading beats vanishing at 1:8."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as jsp
from tests.training.nm_problem import over_seeds


@pytest.mark.parametrize(("gated", "gradient"), [(False, [1, 1, 1, 1]), (True, [1, 1, 0.25, 0.25])])
def test_view_and_gradient(gated, gradient):
    fade = optax.linear_schedule(1, 0, 4)
    updater = jsp.mask_decay(jsp.uniform(0.5), fade=fade, gated=gated)
    params = {"w": jnp.array([[4.0, 3.0, 2.0, 1.0]])}
    state = updater.init(params)
    np.testing.assert_array_equal(updater.view(params, state)["w"], params["w"])
    state = state._replace(count=jnp.int32(3))
    np.testing.assert_array_equal(updater.view(params, state)["w"], [[4, 3, 0.5, 0.25]])
    got = jax.grad(lambda p: updater.view(p, state)["w"].sum())(params)["w"]
    np.testing.assert_array_equal(got, [gradient])
    end = updater.view(params, state._replace(count=jnp.int32(9)))["w"]
    np.testing.assert_array_equal(end, [[4, 3, 0, 0]])


def test_fading_beats_vanishing_at_high_sparsity():
    """The claim, at 1:8."""
    plan = jsp.uniform(0.5, jsp.NM(1, 8))
    at_once = over_seeds(jsp.ste(plan))[0]
    fading = over_seeds(jsp.mask_decay(plan, fade=optax.linear_schedule(1, 0, 200), gated=True))[0]
    assert fading.mean() < at_once.mean()
