"""Schedules and `when`s against their formulas, on the host and traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as jsp

# schedule, formula of the progress 0..1
RAMPS = {
    "cubic": (jsp.cubic, lambda t: 1 - (1 - t) ** 3),
    "linear": (jsp.linear, lambda t: t),
    "cosine": (jsp.cosine, lambda t: (1 - np.cos(np.pi * t)) / 2),
}


@pytest.mark.parametrize(("begin", "end"), [(0, 10), (3, 7), (4, 4), (0, 0), (5, 6)])
@pytest.mark.parametrize("name", RAMPS)
def test_ramps(name, begin, end):
    make, formula = RAMPS[name]
    steps = np.arange(15)
    with jax.numpy_dtype_promotion("strict"):
        got = jax.jit(jax.vmap(make(begin, end)))(steps)
    progress = np.clip((steps - begin) / max(end - begin, 1), 0, 1)
    want = np.where(steps >= end, 1.0, np.where(steps < begin, 0.0, formula(progress)))
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert (got[steps >= end] == 1).all() and (got[steps < begin] == 0).all()
    assert (np.diff(got) >= 0).all() and got.dtype == jnp.float32
    assert float(make(begin, end)(end)) == 1.0


def test_constant():
    assert float(jsp.constant()(0)) == 1.0 and float(jsp.constant(0.25)(jnp.int32(9))) == 0.25


# when, true at these steps of 0..19
WHENS = {
    "every 5": (jsp.every(5), [0, 5, 10, 15]),
    "with start": (jsp.every(5, start=2), [2, 7, 12, 17]),
    "with stop": (jsp.every(5, stop=11), [0, 5, 10]),
    "stop is not included": (jsp.every(5, stop=10), [0, 5]),
    "start and stop": (jsp.every(3, start=4, stop=11), [4, 7, 10]),
    "every step": (jsp.every(1, start=17), [17, 18, 19]),
    "never": (jsp.every(2, start=5, stop=5), []),
    "a stop that is no integer": (jsp.every(4, stop=0.75 * 10), [0, 4]),
    "once": (jsp.once(3), [3]),
    "once at the start": (jsp.once(0), [0]),
}


@pytest.mark.parametrize(("when", "steps"), WHENS.values(), ids=WHENS)
def test_when(when, steps):
    traced = np.asarray(jax.jit(jax.vmap(when))(np.arange(20)))
    assert traced.dtype == bool and np.flatnonzero(traced).tolist() == steps
    assert [t for t in range(20) if when(t)] == steps
