"""MVUE: its expectation by enumeration and by statistics, its variance against a solver."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

import jaxsparse as jsp
from jaxsparse.training._mvue import _sample

CASES = {
    "all small": (2, [4.0, -3, 2, 1]),
    "one large": (2, [6.0, -1, 0.5, 0.5]),
    "one very large": (2, [1.0, -100, 3, 2]),
    "equal": (2, [1.0, 1, -1, 1]),
    "three left": (2, [0.0, 1, 5, -1]),
    "two left": (2, [0.0, -7, 0, 2]),
    "one left": (2, [0.0, 0, 0, -3]),
    "nothing": (2, [0.0, 0, 0, 0]),
    "1:2": (1, [3.0, -1]),
    "1:4": (1, [4.0, -3, 2, 1]),
    "4:8": (4, [9.0, -8, 3, 1, 1, -0.5, 0.25, 0]),
    "all of them": (3, [3.0, -1, 2]),
}
GRID = 2048  # the values of these cases lie on it or near it


@pytest.mark.parametrize(("n", "x"), CASES.values(), ids=CASES)
def test_the_mean_over_every_number_is_x_with_exactly_n_kept(n, x):
    """The only randomness is one number in [0, 1): every one of a grid is tried."""
    x = jnp.array(x)
    u = (jnp.arange(GRID) + 0.5)[:, None, None, None] / GRID
    pattern = jsp.NM(n, len(x), axis=-1)
    rows = jnp.broadcast_to(x, (GRID, 1, len(x)))
    samples = np.asarray(_sample(pattern, rows, u))[:, 0]
    assert (np.count_nonzero(samples, 1) == min(n, np.count_nonzero(x))).all()
    # Each probability is an interval, of which the grid sees all but 1 / GRID at each end.
    level = np.abs(samples).max(0)
    assert (np.abs(samples.mean(0) - x) <= 2 * level / GRID + 1e-6).all()
    assert all(len(np.unique(np.abs(column[column != 0]))) <= 1 for column in samples.T)


def inclusion(n, x):
    u = (jnp.arange(GRID) + 0.5)[:, None, None, None] / GRID
    rows = jnp.broadcast_to(jnp.array(x), (GRID, 1, len(x)))
    samples = _sample(jsp.NM(n, len(x), axis=-1), rows, u)[:, 0]
    return np.asarray((samples != 0).mean(0)), float(samples.var(0).sum())


@pytest.mark.parametrize("name", ["all small", "one large", "one very large", "1:4", "4:8"])
def test_no_unbiased_choice_has_less_variance(name):
    """Variance is the sum of x^2 (1 / p - 1), with 0 < p <= 1 that add up to n."""
    n, x = CASES[name]
    squares = np.square([v for v in x if v])
    best = minimize(
        lambda p: (squares / p).sum() - squares.sum(),
        np.full(len(squares), n / len(squares)),
        bounds=[(1e-3, 1)] * len(squares),
        constraints={"type": "eq", "fun": lambda p: p.sum() - n},
    )
    p, variance = inclusion(n, x)
    np.testing.assert_allclose(p[np.array(x) != 0], best.x, atol=5e-3)
    np.testing.assert_allclose(variance, best.fun, rtol=1e-2)


def test_two_draws_without_replacement_have_more_variance():
    """The approximation that S-STE's code uses: p_i = q_i + sum_j q_j q_i / (1 - q_j)."""
    n, x = CASES["all small"]
    q = np.abs(x) / np.abs(x).sum()
    p = np.array(
        [q[i] + sum(q[j] * q[i] / (1 - q[j]) for j in range(4) if j != i) for i in range(4)]
    )
    assert (np.square(x) * (1 / p - 1)).sum() > 1.02 * inclusion(n, x)[1]


def test_the_mean_over_many_keys_is_x():
    x = jax.random.normal(jax.random.key(0), (2, 8, 5))
    keys = jax.random.split(jax.random.key(1), 4096)
    pattern = jsp.NM(2, 4)
    samples = jax.jit(jax.vmap(lambda key: jsp.mvue(pattern, x, key=key)))(keys)
    groups = np.asarray(samples).reshape(4096, 2, 2, 4, 5)
    assert (np.count_nonzero(groups, 3) == 2).all()
    error = np.asarray(samples.mean(0) - x)
    bound = 5 * np.asarray(samples.std(0)) / 64  # 160 entries: five standard errors
    assert (np.abs(error) <= bound + 1e-5).all()
    # Groups draw for themselves: no two are kept alike in all samples.
    kept = groups[:, 0, 0, 0] != 0
    assert len(np.unique(kept.T, axis=0)) == 5


def test_bf16_and_what_is_not_finite():
    x = jnp.array([[1.0, 2, jnp.nan, 4, 1, 2, 3, 4]], jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        sample = jsp.mvue(jsp.NM(2, 4, axis=-1), x, key=jax.random.key(0))
    assert sample.dtype == jnp.bfloat16 and bool(jnp.isnan(sample[0, 2]))
    assert int((sample[0, 4:] != 0).sum()) == 2
    with pytest.raises(ValueError, match="one axis: use NM"):
        jsp.mvue(jsp.TransposableNM(2, 4), jnp.ones((4, 4)), key=jax.random.key(0))
