"""Weights of constant fan-in: what is stored, what is left out, and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as jsp


def weight(shape=(12, 6), fan_in=3, seed=0):
    w = jax.random.normal(jax.random.key(seed), shape)
    return w * jsp.make_mask(jsp.FanIn(), jnp.abs(w), fan_in / shape[-2])


def test_what_is_stored_by_hand():
    w = jnp.array([[0, 7, 0, 1], [5, 0, 0, 0], [6, 8, 0, 0]], jnp.float32)
    stored = jsp.Condensed.from_dense(w)
    assert stored.outputs.tolist() == [0, 1, 3]  # output 2 has no input
    assert stored.indices.tolist() == [[1, 0, 0], [2, 2, 3]] and stored.indices.dtype == jnp.uint16
    assert stored.values.tolist() == [[5, 7, 1], [6, 8, 0]]
    assert float(stored.density) == pytest.approx(5 / 12)
    assert stored.nbytes == 6 * (4 + 2) + 3 * 4
    assert (stored.todense() == w).all()


@pytest.mark.parametrize("rows", [1, 7])
def test_gradients_are_those_of_the_stored_places(rows):
    w = weight().at[:, 2].set(0).at[4:, 3].set(0)  # an ablated output and a poor one
    x = jax.random.normal(jax.random.key(1), (rows, 12))
    dy = jax.random.normal(jax.random.key(2), (rows, 6))
    stored = jsp.Condensed.from_dense(w)

    def of(values, x):
        return jnp.vdot(x @ jsp.Condensed(values, stored.indices, stored.outputs, (12, 6)), dy)

    dvalues, dx = jax.jit(jax.grad(of, (0, 1)))(stored.values, x)
    np.testing.assert_allclose(dx, dy @ w.T, atol=1e-5)
    as_weight = jsp.Condensed(dvalues, stored.indices, stored.outputs, (12, 6)).todense()
    np.testing.assert_allclose(as_weight, jnp.where(w != 0, x.T @ dy, 0), atol=1e-5)
    assert (dvalues[stored.indices == 12] == 0).all()


def test_from_dense_is_differentiable(key):
    w, mask = weight(), weight() != 0
    slope = jax.grad(lambda w: jnp.sum(jsp.Condensed.from_dense(w, mask).values ** 2))(w)
    np.testing.assert_allclose(slope, 2 * w)


def test_stacks_with_other_numbers_of_outputs(key):
    """Slices share the arrays; the one with fewer outputs leaves places empty."""
    w = jnp.stack([weight(), weight(seed=1).at[:, 1:4].set(0)])
    stored = jsp.Condensed.from_dense(w)
    assert stored.outputs.tolist() == [[0, 1, 2, 3, 4, 5], [0, 4, 5, 6, 6, 6]]
    x = jax.random.normal(key, (2, 5, 12))
    np.testing.assert_allclose(x @ stored, x @ w, atol=1e-5)
    np.testing.assert_array_equal(stored.todense(), w)
    scanned = jax.lax.scan(lambda _, wx: (None, wx[1] @ wx[0]), None, (stored, x))[1]
    np.testing.assert_allclose(scanned, x @ w, atol=1e-5)


def test_under_jit_the_last_inputs_are_left_out():
    w = weight()
    store = jax.jit(lambda w: jsp.Condensed.from_dense(w, fan_in=2).todense())
    first_two = jnp.cumsum(w != 0, 0) <= 2
    np.testing.assert_array_equal(store(w), jnp.where(first_two, w, 0))
    with pytest.raises(TypeError, match="Give fan_in="):
        jax.jit(lambda w: jsp.Condensed.from_dense(w).todense())(w)


def test_what_srigl_leaves_is_stored_without_ablated_outputs(key):
    w = jax.random.normal(key, (16, 8)) * jnp.where(jnp.arange(8) < 4, 1.0, 1e-3)
    plan = jsp.uniform(0.75, jsp.FanIn())
    updater = jsp.srigl(plan, key=key, when=jsp.once(0), drop_fraction=0.5)
    state, grads = updater.init([w]), [w]
    (mask,) = updater.update(state, [w], grads, finite=jnp.array(True)).masks
    left = int(mask.any(0).sum())
    stored = jsp.Condensed.from_dense(w, mask)
    assert left < 8 and stored.values.shape == (32 // left, left)
    np.testing.assert_array_equal(stored.todense(), jnp.where(mask, w, 0))


@pytest.mark.parametrize(
    ("error", "words", "make"),
    [
        (ValueError, "fan_in=2 .* keeps 3", lambda: jsp.Condensed.from_dense(weight(), fan_in=2)),
        (ValueError, "needs a weight", lambda: jsp.Condensed.from_dense(jnp.ones(3))),
        (TypeError, "mask must be bool", lambda: jsp.Condensed.from_dense(weight(), weight())),
        (ValueError, "broadcast", lambda: jsp.Condensed.from_dense(weight(), jnp.ones(5, bool))),
        (ValueError, "x @ w", lambda: jnp.ones(5) @ jsp.Condensed.from_dense(weight())),
    ],
)
def test_errors(error, words, make):
    with pytest.raises(error, match=words):
        make()


def test_empty_weights():
    w = jsp.Condensed.from_dense(jnp.zeros((4, 3)))
    assert w.values.shape == (0, 0) and (jnp.ones((2, 4)) @ w).tolist() == [[0] * 3] * 2
    assert (jnp.ones((0, 4)) @ jsp.Condensed.from_dense(jnp.ones((4, 3)))).shape == (0, 3)
