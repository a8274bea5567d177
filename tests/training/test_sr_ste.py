"""Where the decay of SR-STE stands, when masks are chosen, and that decay settles them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as jsp
from tests.training.nm_problem import NM24, over_seeds

HALF = jsp.uniform(0.5)
ZERO = {"w": jnp.zeros((1, 4))}


def test_decay_before_the_moments_goes_through_adam_and_after_them_does_not():
    params = {"w": jnp.array([[4.0, 3.0, 2.0, 1.0]])}
    before = jsp.sparsify(optax.adam(0.1), jsp.sr_ste(HALF, decay=0.01))
    after = jsp.sparsify(optax.adam(0.1), jsp.sr_ste(HALF, decay=0.01, decoupled=True))
    updates, state = before.update(ZERO, before.init(params), params)
    np.testing.assert_allclose(updates["w"], [[0, 0, -0.1, -0.1]], rtol=1e-4)  # normalised
    np.testing.assert_allclose(state.inner[0].mu["w"], [[0, 0, 0.002, 0.001]], rtol=1e-5)
    updates, state = after.update(ZERO, after.init(params), params)
    np.testing.assert_allclose(updates["w"], [[0, 0, -0.02, -0.01]], rtol=1e-5)
    assert not state.inner[0].mu["w"].any()


def test_decay_may_be_a_schedule_or_traced():
    params = {"w": jnp.array([[4.0, 1.0]])}
    grads = {"w": jnp.zeros((1, 2))}
    tx = jsp.sparsify(optax.sgd(1.0), jsp.sr_ste(HALF, decay=optax.linear_schedule(0, 1, 4)))
    state, seen = tx.init(params), []
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
        seen.append(float(updates["w"][0, 1]))
    assert seen == [0, -0.25, -0.5]

    def step(decay):
        tx = jsp.sparsify(optax.sgd(1.0), jsp.sr_ste(HALF, decay=decay))
        return tx.update(grads, tx.init(params), params)[0]["w"][0, 1]

    np.testing.assert_allclose(jax.vmap(step)(jnp.array([0.0, 0.5])), [0, -0.5])
    with pytest.raises(
        ValueError, match="decay pulls pruned weights to zero and must be >= 0; got -1"
    ):
        jsp.sr_ste(HALF, decay=-1)


def test_masks_are_chosen_when_due_and_not_after_a_bad_gradient():
    updater = jsp.ste(HALF, when=jsp.every(3))
    state = updater.init({"w": jnp.array([[4.0, 1.0]])})
    turned = {"w": jnp.array([[1.0, 4.0]])}
    seen = []
    for finite in (True, True, False, True, True):
        state = updater.update(state, turned, turned, finite=jnp.array(finite))
        seen.append((int(state.count), state.masks["w"][0].tolist()))
    old, new = [True, False], [False, True]
    assert seen == [(1, old), (2, old), (2, old), (3, new), (4, new)]


def test_structure_decay_halves_the_kept():
    plan = jsp.uniform(0.5, jsp.NM(1, 8))
    updater = jsp.ste(plan, schedule=jsp.halving(1, 8, begin=1, end=7))
    params = {"w": jnp.arange(1.0, 17).reshape(8, 2)}
    state, kept = updater.init(params), []
    for _ in range(9):
        kept.append(int(state.masks["w"][:, 0].sum()))
        state = updater.update(state, params, params, finite=jnp.array(True))
    assert kept == [8, 7, 7, 4, 4, 2, 2, 1, 1]
    with pytest.raises(ValueError, match="0 < n < m"):
        jsp.halving(8, 8, 0, 1)
    assert [round(16 - 13 * float(jsp.halving(3, 16, 0, 3)(t))) for t in range(4)] == [15, 8, 4, 3]


def test_masks_flip_less_than_those_of_ste():
    """The claim: decay of what is pruned lowers the SAD."""
    _, free, *_ = over_seeds(jsp.ste(NM24))
    for options in ({"decay": 1e-2}, {"decay": 1e-2, "decoupled": True}):
        _, pulled, *_ = over_seeds(jsp.sr_ste(NM24, **options))
        assert (pulled.sum(1) < 0.7 * free.sum(1)).all()
