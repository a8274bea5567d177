"""WGSEF: its proximal map against a solver, and that it reaches the preset number of groups."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize

import jaxsparse as jsp


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("strength", [0.1, 2.0])
def test_the_map_minimises_the_envelope(k, strength):
    """min over x, u of |x - v|^2 / 2 + strength / 2 sum |x_g|^2 / u_g; over x it is closed."""
    v = np.random.default_rng(k).normal(size=(3, 5)).astype(np.float32)
    norms = np.linalg.norm(v, axis=0)
    found = minimize(
        lambda u: (strength * norms**2 / (u + strength)).sum() / 2,
        np.full(5, k / 5),
        bounds=[(1e-9, 1)] * 5,
        constraints={"type": "ineq", "fun": lambda u: k - u.sum()},
        options={"ftol": 1e-12, "maxiter": 500},
    )
    want = v * (found.x / (found.x + strength))
    got = jsp.group_envelope_prox(jsp.Channel(-1), v, k / 5, strength)
    np.testing.assert_allclose(got, want, atol=2e-3)


@pytest.mark.parametrize(
    "pattern", [jsp.Unstructured(), jsp.Block((2, 4)), jsp.Channel(-2), jsp.FanIn()]
)
def test_repeated_steps_leave_the_preset_number_of_groups(pattern):
    w = jax.random.normal(jax.random.key(0), (2, 8, 8))
    step = jax.jit(lambda w: jsp.group_envelope_prox(pattern, w, 0.25, 0.2))
    for _ in range(100):
        w = step(w)
    norms = np.asarray(pattern.gather(jnp.abs(w)))
    size = np.prod([norms.shape[a] for a in pattern.axes])
    assert ((norms > 0).sum(pattern.axes) == round(0.25 * size)).all()


def test_zeros_tiny_and_huge_weights():
    pattern = jsp.Unstructured()
    assert not jsp.group_envelope_prox(pattern, jnp.zeros((2, 2)), 0.5, 1.0).any()
    w = jnp.array([[1e-15, 0.0], [1e15, -1.0]])
    got = jsp.group_envelope_prox(pattern, w, 0.5, 1.0)
    np.testing.assert_allclose(got, [[0, 0], [5e14, -0.5]], rtol=1e-5, atol=1e-20)
    half = jsp.group_envelope_prox(pattern, jnp.array([[4, 2, 0.25, 0.25]], jnp.bfloat16), 0.5, 1.0)
    assert half.dtype == jnp.bfloat16 and half.tolist() == [[2, 1, 0, 0]]


def test_training_finds_the_channels_of_the_target_at_the_preset_level():
    """The claim: the preset sparsity is reached at convergence, at little loss."""
    truth = (
        jnp.zeros((6, 8)).at[jnp.array([1, 4])].set(jax.random.normal(jax.random.key(1), (2, 8)))
    )
    x = jax.random.normal(jax.random.key(2), (64, 6))
    plan = jsp.uniform(2 / 3, jsp.Channel(-2))
    tx = optax.chain(optax.sgd(0.1), jsp.group_envelope(plan, strength=1e-2))
    params = {"w": jax.random.normal(jax.random.key(3), (6, 8)), "bias": jnp.ones(8)}

    def step(carry, _):
        params, state = carry

        def loss(p):
            return jnp.mean(jnp.sum(jnp.square(x @ (p["w"] - truth) + p["bias"]), -1)) / 2

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), loss(params)

    (params, _), losses = jax.jit(
        lambda: jax.lax.scan(step, (params, tx.init(params)), length=300)
    )()
    assert np.flatnonzero(np.abs(params["w"]).sum(1)).tolist() == [1, 4]
    assert losses[-1] < 0.03 * losses[0]


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="must be > 0; got 0"):
        jsp.group_envelope(jsp.uniform(0.5), strength=0)
    with pytest.raises(ValueError, match="must be > 0; got -1"):
        jsp.group_envelope_prox(jsp.Unstructured(), jnp.ones((2, 2)), 0.5, -1)
    tx = jsp.group_envelope(jsp.uniform(0.5), strength=1.0)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update({"w": jnp.ones((2, 2))}, tx.init(None), None)
