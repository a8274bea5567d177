"""Scores against their formulas, and the evidence they ask for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import jaxsparse as jsp
from tests.conformance.lists import SCORES, make_params

W = np.array([[-2.0, 1.0, 0.0], [0.5, -0.0, 3.0]], np.float32)
G = np.array([[1.0, -4.0, 7.0], [0.0, -1.0, 0.25]], np.float32)

FORMULAS = {
    "magnitude": lambda w, g: np.abs(w),
    "gradient": lambda w, g: np.abs(g),
    "saliency": lambda w, g: np.abs(w * g),
    "snip": lambda w, g: np.abs(w * g),
    "movement": lambda w, g: -w * g,
    "fisher": lambda w, g: w * w * np.abs(g) / 2,
}
EVIDENCE = {"fisher": {"fisher": np.abs(G)}, "magnitude": {}}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_formula(name, dtype):
    evidence = EVIDENCE.get(name, {"grad": G})
    with jax.numpy_dtype_promotion("strict"):
        got = jax.jit(SCORES[name])(
            jnp.asarray(W, dtype), **{k: jnp.asarray(v, dtype) for k, v in evidence.items()}
        )
    assert got.dtype == dtype  # the numbers above are exact in bf16 too
    np.testing.assert_array_equal(got.astype(np.float32), FORMULAS[name](W, G))


def test_every_score_has_a_formula_here_but_the_random_one():
    assert set(FORMULAS) | {"random"} == set(SCORES) == set(jsp.scores.__all__)


def test_random_scores_depend_on_the_path_and_nothing_else(key):
    params = make_params()
    masks = jsp.prune(params, jsp.uniform(0.5), jsp.random, key=key)[1]
    more = {**params, "another": jnp.ones((4, 4))}
    again = jsp.prune(more, jsp.uniform(0.5), jsp.random, key=key)[1]
    jax.tree.map(np.testing.assert_array_equal, masks["layers"], again["layers"])
    same_shape = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
    masks = jsp.prune(same_shape, jsp.uniform(0.5), jsp.random, key=key)[1]
    assert (masks["a"] != masks["b"]).any()
    other = jsp.prune(same_shape, jsp.uniform(0.5), jsp.random, key=jax.random.key(1))[1]
    assert (masks["a"] != other["a"]).any()


def test_random_noise_is_uniform(key):
    noise = np.asarray(jsp.random(jnp.zeros((100, 100), jnp.bfloat16), key=key))
    assert noise.dtype == np.float32 and 0 <= noise.min() and noise.max() < 1
    np.testing.assert_allclose(np.histogram(noise, 10, (0, 1))[0] / 1e4, 0.1, atol=0.015)


@pytest.mark.parametrize("name", SCORES)
def test_prune_hands_each_leaf_its_evidence(name, key):
    params = make_params()
    tree = jax.tree.map(
        lambda w: jnp.square(jnp.sin(jnp.arange(w.size) + 1.0)).reshape(w.shape), params
    )
    evidence = {"random": {"key": key}, **{k: {n: tree for n in v} for k, v in EVIDENCE.items()}}
    pruned, masks = jsp.prune(
        params, jsp.uniform(0.5), SCORES[name], **evidence.get(name, {"grad": tree})
    )
    assert float(jsp.density(masks)) == 0.5
    jax.tree.map(
        lambda p, w, m: np.testing.assert_array_equal(p, np.where(m, w, 0)), pruned, params, masks
    )
    if name in FORMULAS:
        w, g = params["layers"]["up"]["kernel"], tree["layers"]["up"]["kernel"]
        want = jsp.make_mask(jsp.Unstructured(), FORMULAS[name](np.asarray(w), np.asarray(g)), 0.5)
        np.testing.assert_array_equal(masks["layers"]["up"]["kernel"], want)


def test_noise_is_uniform_and_independent_of_place_and_key():
    """The hash behind `random`: against a uniform distribution, neighbours, and another key."""
    w = jnp.zeros((256, 256))
    a, b = (np.asarray(jsp.random(w, key=jax.random.key(i))) for i in (0, 1))
    assert a.dtype == np.float32 and a.min() >= 0 and a.max() < 1
    assert scipy.stats.kstest(a.reshape(-1), "uniform").pvalue > 1e-3
    for x, y in ((a[1:], a[:-1]), (a[:, 1:], a[:, :-1]), (a, b)):
        assert abs(np.corrcoef(x.reshape(-1), y.reshape(-1))[0, 1]) < 0.02  # sigma 0.004
    top = a > 0.9
    for counts in (top.sum(0), top.sum(1), top.reshape(32, 8, 32, 8).sum((1, 3))):
        expected = counts.mean() * 0.9  # of a binomial
        assert 0.7 < counts.var() / expected < 1.3
    assert np.isnan(jsp.random(w.at[3, 4].set(jnp.nan), key=jax.random.key(0))[3, 4])
