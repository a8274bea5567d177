"""SLoRB: what pruning took from each output, and what the branch gives back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as jsp

W = jax.random.normal(jax.random.key(0), (2, 16, 6))
MASK = jsp.make_mask(jsp.NM(2, 4), jnp.abs(W), 0.5)


def test_inputs_that_are_alike_in_a_group_lose_nothing():
    branch = jsp.slorb_init(W, MASK, 8)
    assert branch.shape == (2, 2, 6)
    x = jnp.repeat(jax.random.normal(jax.random.key(1), (5, 2)), 8, -1)
    sparse = x @ jnp.where(MASK[0], W[0], 0)
    np.testing.assert_allclose(sparse + jsp.slorb(x, branch[0]), x @ W[0], rtol=1e-4, atol=1e-5)


def test_it_brings_the_output_nearer():
    """The claim, for inputs that have a mean of their own."""
    w, mask = W[0], MASK[0]
    x = 1 + 0.3 * jax.random.normal(jax.random.key(2), (64, 16))
    sparse = x @ jnp.where(mask, w, 0)
    error = jnp.square(sparse - x @ w).mean()
    branch = jsp.slorb_init(w, mask, 4)
    assert jnp.square(sparse + jsp.slorb(x, branch) - x @ w).mean() < 0.2 * error


def test_groups_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"a divisor of axis -2; got k=5 and \(2, 16, 6\)"):
        jsp.slorb_init(W, MASK, 5)
    with pytest.raises(ValueError, match=r"got \(3, 5\) and \(2, 6\)"):
        jsp.slorb(jnp.ones((3, 5)), jnp.ones((2, 6)))
