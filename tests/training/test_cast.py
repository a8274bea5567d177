"""CAST: even decay by hand, and that the model ends sparse and better than one that is just cut."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as jsp
from tests.training.nm_problem import NM24, SEEDS, loss_of, over_seeds, problem


def test_every_entry_off_the_mask_moves_by_the_same_amount_whatever_adam_does():
    params = {"w": jnp.array([[8.0, 7.0, 2.0, -1.0, 0.3, -0.1]])}
    updater = jsp.cast(jsp.uniform(2 / 3), decay=lambda step: 0.25 * (step + 1))
    tx = jsp.sparsify(optax.scale_by_adam(), updater)
    state = tx.init(params)
    # After one Adam step every update is the sign of its gradient.
    grads = {"w": jnp.array([[0.0, 0, 0, 0, 0, 0]])}
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], [[8, 7, 1.75, -0.75, 0.05, 0]], rtol=1e-6)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], [[8, 7, 1.25, -0.25, 0, 0]], rtol=1e-6)
    assert updater.view(params, state.updater) is params
    with pytest.raises(ValueError, match="decay .* must be >= 0; got -0.1"):
        jsp.cast(NM24, decay=-0.1)


def test_masks_are_renewed_every_ten_steps():
    updater = jsp.cast(jsp.uniform(0.5), decay=0.0)
    state = updater.init({"w": jnp.array([[2.0, 1.0]])})
    turned = {"w": jnp.array([[1.0, 2.0]])}
    for count in range(1, 11):
        state = updater.update(state, turned, turned, finite=jnp.array(True))
        assert bool(state.masks["w"][0, 1]) == (count == 10)


def test_what_is_off_the_mask_dies_out_and_cutting_it_costs_nothing():
    """The claim: a dense model turns into its mask without a jump."""
    decay = optax.linear_schedule(0, 6e-3, 200)
    dense, _, params, state = over_seeds(jsp.cast(NM24, decay=decay))
    cut = jax.vmap(jsp.apply_masks)(params, jsp.masks(state))

    @jax.jit
    def losses(params):
        return jax.vmap(lambda w, seed: loss_of(w, *problem(seed)[:2]))(params, SEEDS)

    np.testing.assert_allclose(losses(cut), dense, rtol=0.05, atol=1e-3)
    _, _, params, state = over_seeds(jsp.cast(NM24, decay=0.0))
    assert (losses(cut) < 0.5 * losses(jax.vmap(jsp.apply_masks)(params, jsp.masks(state)))).all()
