"""Dense phases, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as jsp
from tests.training.nm_problem import NM24, over_seeds


def test_no_mask_and_no_decay_while_dense():
    updater = jsp.dense_when(jsp.sr_ste(jsp.uniform(0.5), decay=0.5), lambda step: step == 1)
    tx, params = jsp.sparsify(optax.sgd(1.0), updater), {"w": jnp.array([[4.0, 1.0]])}
    state, seen = tx.init(params), []
    for _ in range(3):
        view = updater.view(params, state.updater)["w"]
        updates, state = tx.update({"w": jnp.zeros((1, 2))}, state, params)
        seen.append((view[0].tolist(), updates["w"][0].tolist()))
    assert seen == [([4, 0], [0, -0.5]), ([4, 1], [0, 0]), ([4, 0], [0, -0.5])]
    jsp.check(params, state)


@pytest.mark.parametrize("build", [jsp.ste, jsp.sr_ste, jsp.s_ste])
def test_the_gradient_reaches_every_weight_in_both_phases(build):
    params = {"w": jax.random.normal(jax.random.key(0), (8, 4))}
    updater = jsp.dense_when(build(NM24), lambda step: step == 1)
    first = updater.init(params)

    def view(params, step):
        return updater.view(params, first._replace(count=step))["w"]

    for step in (0, 1):
        seen, back = jax.vjp(view, params, step)
        np.testing.assert_array_equal(back(2 * jnp.ones((8, 4)))[0]["w"], 2 * jnp.ones((8, 4)))
        assert bool((seen == params["w"]).all()) == step


def test_a_dense_tail_ends_near_dense_training():
    """The claim: fine-tuning densely at the end makes up for most of what 2:4 lost."""
    sparse = over_seeds(jsp.ste(NM24))[0]
    tail = over_seeds(jsp.dense_when(jsp.ste(NM24), lambda step: step >= 250))[0]
    dense = over_seeds(jsp.dense_when(jsp.ste(NM24), lambda step: step >= 0))[0]
    assert (tail < sparse).all() and (tail - dense).mean() < 0.5 * (sparse - dense).mean()


def test_updaters_with_sparse_weights_are_refused():
    updater = jsp.dense_when(jsp.static(NM24, score=jsp.magnitude), jsp.every(2))
    with pytest.raises(ValueError, match="weights stay dense .* got one with a StaticState"):
        updater.init({"w": jnp.ones((4, 4))})
