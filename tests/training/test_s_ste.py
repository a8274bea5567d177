"""S-STE: its threshold and scale by brute force, and that its masks flip less."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as jsp
from tests.training.nm_problem import NM24, over_seeds

RNG = np.random.default_rng(0)


def by_hand(w, n, m):
    """Along the last axis, group by group."""
    groups = w.reshape(-1, m)
    t = np.sort(np.abs(groups), 1)[:, m - n - 1, None]
    return (np.sign(groups) * np.maximum(np.abs(groups) - t, 0)).reshape(w.shape)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8), (4, 4)])
def test_the_threshold_is_the_largest_magnitude_that_is_dropped(n, m):
    """Of four the second smallest."""
    w = RNG.normal(size=(3, 6, 2 * m)).astype(np.float32)
    want = np.asarray(w) if n == m else by_hand(w, n, m)
    pattern = jsp.NM(n, m, axis=-1)
    np.testing.assert_array_equal(jsp.nm_soft_threshold(pattern, w), want)
    turned = jsp.nm_soft_threshold(jsp.NM(n, m), jnp.swapaxes(w, -1, -2))
    np.testing.assert_array_equal(jnp.swapaxes(turned, -1, -2), want)


def test_it_has_no_jumps_where_the_hard_mask_jumps():
    path = jnp.linspace(0, 1, 201)[:, None]
    w = (1 - path) * jnp.array([3.0, 2, 1, 0]) + path * jnp.array([0.0, 1, 2, 3.0])
    pattern = jsp.NM(2, 4, axis=-1)
    soft = jsp.nm_soft_threshold(pattern, w)
    hard = jnp.where(jsp.make_mask(pattern, w, 0.5), w, 0)
    assert float(jnp.abs(jnp.diff(soft, axis=0)).max()) < 0.05
    assert float(jnp.abs(jnp.diff(hard, axis=0)).max()) > 1


def test_the_view_is_scaled_once_by_least_squares_for_each_matrix():
    params = {
        "stack": jnp.asarray(RNG.normal(size=(2, 8, 6)), jnp.float32),
        "one": jnp.asarray(RNG.normal(size=(4, 4)), jnp.float32),
        "bias": jnp.ones(4),
    }
    updater = jsp.s_ste(NM24)
    state = updater.init(params)
    s = {
        k: by_hand(np.swapaxes(params[k], -1, -2), 2, 4).swapaxes(-1, -2) for k in ("one", "stack")
    }
    fits = [np.vdot(params["one"], s["one"]) / np.vdot(s["one"], s["one"])]
    fits += [
        np.vdot(params["stack"][i], s["stack"][i]) / np.vdot(*2 * [s["stack"][i]]) for i in (0, 1)
    ]
    np.testing.assert_allclose(state.scales, fits, rtol=1e-5)
    view = updater.view(params, state)
    np.testing.assert_allclose(view["stack"][1], fits[2] * s["stack"][1], rtol=1e-5)
    np.testing.assert_allclose(view["one"], fits[0] * s["one"], rtol=1e-5)
    assert view["bias"] is params["bias"]
    moved = updater.update(
        state, jax.tree.map(lambda w: w**3, params), params, finite=jnp.array(True)
    )
    np.testing.assert_array_equal(moved.scales, state.scales)
    gradient = jax.grad(lambda p: (3 * updater.view(p, state)["one"]).sum())(params)
    np.testing.assert_array_equal(gradient["one"], jnp.full((4, 4), 3.0))


def test_bf16_and_weights_that_are_all_alike():
    params = {"w": jnp.ones((4, 4), jnp.bfloat16)}
    updater = jsp.s_ste(NM24)
    with jax.numpy_dtype_promotion("strict"):
        view = updater.view(params, updater.init(params))["w"]
    assert view.dtype == jnp.bfloat16 and not view.any()


def test_masks_flip_less_than_those_of_ste_and_the_model_is_better():
    """The claim: a continuous projection ends the oscillation of masks."""
    hard, hard_flips, *_ = over_seeds(jsp.ste(NM24))
    soft, soft_flips, *_ = over_seeds(jsp.s_ste(NM24))
    late = slice(150, None)
    assert (soft_flips[:, late].mean(1) < 0.3 * hard_flips[:, late].mean(1)).all()
    assert soft.mean() < hard.mean()


@pytest.mark.parametrize(
    "pattern", [jsp.Unstructured(), jsp.Block((2, 2)), jsp.TransposableNM(2, 4)]
)
def test_other_patterns_are_refused(pattern):
    with pytest.raises(ValueError, match=r"s_ste has a threshold for each group of an NM.*layer/w"):
        jsp.s_ste(jsp.uniform(0.5, pattern)).init({"layer": {"w": jnp.ones((4, 4))}})
