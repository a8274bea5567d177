"""The skeletons in docs/ run as they are, and do what they say against plain numpy."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as jsp
from docs.skeletons import pattern, score, updater
from jaxsparse import testing

KEY = jax.random.key(0)


@pytest.mark.parametrize("name", ["pattern", "score", "updater"])
def test_doctests(name):
    module = importlib.import_module(f"docs.skeletons.{name}")
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, tried = doctest.testmod(module, optionflags=flags)
    assert tried and not failed


def test_the_updater_keeps_the_contract():
    params = {"w": jax.random.normal(KEY, (8, 8)), "b": jnp.ones(8)}
    iht = updater.iht(jsp.uniform(0.5), when=jsp.every(2), step_size=3.0)
    plan = jsp.uniform(0.5)(params)
    testing.check_updater(iht, optax.adam(1e-2), params, plan=plan, moves=True)


def test_the_pattern_keeps_the_contract():
    testing.check_pattern(pattern.Heads(2), (4, 8))


def test_heads_are_kept_whole_in_every_slice():
    scores = jax.random.normal(KEY, (3, 4, 8))
    mask = np.asarray(jsp.make_mask(pattern.Heads(2), scores, 0.5))
    heads = mask.reshape(3, 4, 4, 2)
    assert (heads == heads[:, :1, :, :1]).all()
    best = np.argsort(np.asarray(scores).reshape(3, 4, 4, 2).sum((1, 3)))[:, 2:]
    for kept, wanted in zip(heads[:, 0, :, 0], best, strict=True):
        assert set(np.flatnonzero(kept)) == set(wanted)
    with pytest.raises(ValueError, match="multiple of 3"):
        jsp.make_mask(pattern.Heads(3), scores, 0.5)


def test_a_score_reads_its_evidence():
    w = jax.random.normal(KEY, (4, 6))
    variance = jnp.exp(jax.random.normal(jax.random.key(1), w.shape))
    expected = np.abs(w) / np.sqrt(variance)
    np.testing.assert_allclose(score.signal_to_noise(w, variance=variance), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="variance"):
        jsp.prune({"w": w}, jsp.uniform(0.5), score.signal_to_noise)


def test_iht_keeps_the_top_of_the_gradient_step():
    params = {"w": jax.random.normal(KEY, (8, 8)), "b": jnp.ones(8)}
    grads = {"w": 30 * jax.random.normal(jax.random.key(1), (8, 8)), "b": jnp.ones(8)}
    tx = jsp.sparsify(optax.adam(1e-2), updater.iht(jsp.uniform(0.75), when=jsp.once(0)))
    first = tx.init(params)
    updates, state = jax.jit(tx.update)(grads, first, params)
    on = np.asarray(jsp.masks(first)["w"])
    size = np.abs(np.where(on, params["w"], 0) - 0.1 * np.asarray(grads["w"]))
    assert set(np.flatnonzero(jsp.masks(state)["w"])) == set(np.argsort(size.ravel())[-16:])
    jsp.check(optax.apply_updates(params, updates), state)
    assert float(jsp.churn(jsp.masks(first), jsp.masks(state))) > 0
    _, quiet = jax.jit(tx.update)(grads, state, params)
    assert float(jsp.churn(jsp.masks(state), jsp.masks(quiet))) == 0
    with pytest.raises(ValueError, match="step_size"):
        updater.iht(jsp.uniform(0.5), when=jsp.once(0), step_size=0)
