"""Flip rates against numpy, and the decay that they choose."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as jsp
from tests.conformance.lists import fast_jit
from tests.training.nm_problem import NM24, over_seeds, train


def test_it_counts_what_flips_and_changes_nothing():
    loss, flips, params, state = over_seeds(jsp.flip_meter(jsp.sr_ste(NM24, decay=1e-3)), steps=40)
    plain, bare, same, _ = over_seeds(jsp.sr_ste(NM24, decay=1e-3), steps=40)
    jax.tree.map(np.testing.assert_array_equal, (loss, params), (plain, same))
    np.testing.assert_allclose(state.updater.total, bare.sum(1), rtol=1e-5)
    np.testing.assert_array_equal(state.updater.rate, flips[:, -1])
    assert state.updater.dense_weights


def test_it_wraps_updaters_with_sparse_weights_too():
    updater = jsp.flip_meter(jsp.set_(jsp.uniform(0.5), key=jax.random.key(0), when=jsp.once(0)))
    tx, params = jsp.sparsify(optax.sgd(0.1), updater), {"w": jnp.arange(16.0).reshape(4, 4)}
    state = tx.init(params)
    update = fast_jit(tx.update)
    updates, new = update(params, state, params)
    rate = float((jsp.masks(state)["w"] != jsp.masks(new)["w"]).mean())
    assert float(new.updater.rate) == rate > 0 and not new.updater.dense_weights
    jsp.check(optax.apply_updates(params, updates), new)
    bad = jax.tree.map(lambda g: g * jnp.nan, params)
    _, after = update(bad, new, params)
    assert float(after.updater.rate) == rate and float(after.updater.total) == rate


def test_decay_lowers_the_flip_rate_and_one_is_chosen_in_warm_up():
    """All candidates at once, by vmap; the claim: a feasible decay is better than none."""
    decays = jnp.array([0.0, 4e-3, 8e-3, 1.6e-2, 1.6e-1])

    def late_rate(updater):
        state = train(jsp.flip_meter(updater), 0, steps=150)[3]
        return state.updater.total / 150

    rates = fast_jit(jax.vmap(lambda decay: late_rate(jsp.sr_ste(NM24, decay=decay))))(decays)
    assert (np.diff(rates) < 0).all()
    chosen = jsp.choose_decay(decays, rates, rates[0], low=0.4, high=0.8)
    share = np.asarray(rates / rates[0])
    inside = [i for i in range(5) if 0.4 <= share[i] <= 0.8]
    assert float(chosen) == float(decays[min(inside, key=lambda i: abs(share[i] - 0.6))])
    always = jsp.dense_when(jsp.ste(NM24), lambda step: step >= 0)
    dense = fast_jit(lambda: late_rate(always))()
    assert 0 < float(dense) < float(rates[0])  # masks of a dense model move slowly


def test_no_feasible_decay_is_nan_and_bad_options_are_named():
    assert jnp.isnan(jsp.choose_decay(jnp.array([1.0, 2.0]), jnp.array([0.1, 3.0]), 1.0))
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(1,\)"):
        jsp.choose_decay(jnp.ones(2), jnp.ones(1), 1.0)
    with pytest.raises(ValueError, match="low=0.9, high=0.5"):
        jsp.choose_decay(jnp.ones(1), jnp.ones(1), 1.0, low=0.9, high=0.5)
