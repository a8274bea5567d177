"""Straight-through training against a loop written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as jsp
from tests.conformance.lists import make_params

PATTERNS = {
    "unstructured": jsp.Unstructured(),
    "2:4": jsp.NM(2, 4),
    "1:4 of outputs": jsp.NM(1, 4, axis=-1),
    "blocks": jsp.Block((2, 2)),
}
TARGET = np.random.default_rng(1).integers(-8, 9, (2, 8, 8)).astype(np.float32) / 4
START = np.random.default_rng(0).permutation(128).reshape(2, 8, 8).astype(np.float32) / 32 - 2


@pytest.mark.parametrize("decay", [None, 0.25], ids=["ste", "sr_ste"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_view_is_masked_by_the_current_weights_at_every_step(pattern, decay):
    """loss = |view - target|^2 / 2, sgd(1/2): every number is exact in float32."""
    plan = jsp.uniform(0.5, PATTERNS[pattern])
    updater = jsp.ste(plan) if decay is None else jsp.sr_ste(plan, decay=decay)
    tx = jsp.sparsify(optax.sgd(0.5), updater)

    @jax.jit
    def step(params, state):
        def loss(params):
            view = updater.view(params, state.updater)
            return jnp.sum(jnp.square(view["w"] - TARGET)) / 2, view

        grads, view = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, view

    params = {"w": jnp.asarray(START)}
    state, w, turned = tx.init(params), START, 0
    density = plan(params)["w"].density
    before = None
    for _ in range(6):
        mask = np.asarray(jsp.make_mask(PATTERNS[pattern], np.abs(w), density))
        np.testing.assert_array_equal(jsp.masks(state)["w"], mask)
        params, state, view = step(params, state)
        np.testing.assert_array_equal(view["w"], w * mask)
        w = w - 0.5 * ((w * mask - TARGET) + (decay or 0) * w * ~mask)
        np.testing.assert_array_equal(params["w"], w)
        turned += 0 if before is None else int((mask != before).sum())
        before = mask
    assert turned > 0  # masks that never moved would test nothing


def test_the_gradient_passes_straight_through():
    updater = jsp.ste(jsp.uniform(0.75))
    params = make_params()
    state = updater.init(params)
    weights = jax.tree.map(lambda w: jnp.cos(jnp.arange(w.size * 1.0)).reshape(w.shape), params)

    def loss(params):
        view = updater.view(params, state)
        return sum(map(jnp.vdot, jax.tree.leaves(view), jax.tree.leaves(weights)))

    for gradient in (jax.grad(loss)(params), jax.jacfwd(loss)(params)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), gradient, weights)
    view = updater.view(params, state)
    masked = jax.tree.map(lambda w, m: w * m, params, state.masks)
    jax.tree.map(np.testing.assert_array_equal, view, masked)
    assert view["layers"]["up"]["bias"] is params["layers"]["up"]["bias"]


def test_straight_through_hides_what_is_not_finite():
    w, mask = jnp.array([jnp.nan, 2.0]), jnp.array([False, True])
    value, gradient = jax.value_and_grad(lambda w: jsp.straight_through(w, mask).sum())(w)
    assert value == 2 and gradient.tolist() == [1, 1]
    with jax.numpy_dtype_promotion("strict"):
        assert jsp.straight_through(w.astype(jnp.bfloat16), mask).dtype == jnp.bfloat16


def test_other_updaters_show_the_weights_themselves():
    params = make_params()
    plan = jsp.uniform(0.5)
    for updater in (jsp.static(plan, score=jsp.magnitude), jsp.fixed(jsp.prune(params, plan)[1])):
        assert updater.view(params, updater.init(params)) is params
