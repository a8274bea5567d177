"""Through `nnx.Optimizer`, whose state wraps every array: the same as the plain Optax loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsparse as jsp
from tests.conformance.lists import UPDATERS, NNXModel, leaves, make_updater


def loss(params):
    return sum(jnp.sum(jnp.square(w - 0.5)) for w in jax.tree.leaves(params))


@pytest.mark.parametrize("updater", UPDATERS)
def test_nnx_optimizer_is_the_plain_loop(updater):
    model = NNXModel(**leaves())
    params = nnx.state(NNXModel(**leaves()), nnx.Param)  # its own: a model is updated in place
    built, _ = make_updater(updater, jsp.Unstructured(), params)
    tx = jsp.sparsify(optax.sgd(0.1, momentum=0.5), built)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        params = nnx.state(model, nnx.Param)
        grads = jax.grad(lambda p: loss(built.view(p, optimizer.opt_state.updater)))(params)
        optimizer.update(model, grads)

    @jax.jit
    def plain(params, state):
        grads = jax.grad(lambda p: loss(built.view(p, state.updater)))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        step(model, optimizer)
        params, state = plain(params, state)
    trained = nnx.state(model, nnx.Param)
    jax.tree.map(np.testing.assert_array_equal, trained, params)
    masks = jsp.masks(optimizer.opt_state)
    for a, b in zip(jax.tree.leaves(masks), jax.tree.leaves(jsp.masks(state)), strict=True):
        np.testing.assert_array_equal(a, b)
    jsp.check(trained, optimizer.opt_state)


def test_masks_of_an_nnx_optimizer_apply_to_its_model(key):
    model = NNXModel(**leaves())
    tx = jsp.sparsify(optax.adam(1e-2), jsp.static(jsp.uniform(0.5), key=key), packed=True)
    masks = jsp.masks(nnx.Optimizer(model, tx, wrt=nnx.Param).opt_state)
    params = nnx.state(model, nnx.Param)
    pruned = jsp.apply_masks(params, masks)
    assert jax.tree.structure(pruned) == jax.tree.structure(params)
    assert int((pruned["head"]["kernel"].get_value() == 0).sum()) == 64
    assert jnp.allclose(jsp.density(masks, params), (64 + 64 + 16) / (128 + 128 + 16))
    again = jsp.sparsify(optax.adam(1e-2), jsp.fixed(masks)).init(params)
    assert float(jsp.overlap(jsp.masks(again), masks)) == 1
