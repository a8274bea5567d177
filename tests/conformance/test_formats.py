"""Every weight format: `x @ w` is the product with the dense weight, however it is written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.formats import SparseWeight
from tests.conformance.lists import DTYPES, FORMATS


def weight(dtype):
    """[16, 8], two kept of every four along the inputs, in which block columns and rows vanish."""
    w = jax.random.normal(jax.random.key(0), (16, 8))
    keep = (jnp.arange(16) % 4 < 2)[:, None] & (jnp.arange(8) < 6) & (jnp.arange(16) >= 4)[:, None]
    return jnp.where(keep, w, 0).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_products_and_gradients(name, dtype):
    w, tolerance = weight(DTYPES[dtype]), {"f32": 1e-5, "bf16": 2e-2}[dtype]
    stored = FORMATS[name](w)
    assert isinstance(stored, SparseWeight)
    assert stored.shape == w.shape and stored.dtype == w.dtype
    np.testing.assert_array_equal(stored.todense(), w)
    x = jax.random.normal(jax.random.key(1), (3, 5, 16)).astype(w.dtype)

    def close(got, want):
        got, want = (np.asarray(a, np.float32) for a in (got, want))
        np.testing.assert_allclose(got, want, atol=tolerance * max(np.abs(want).max(), 1e-6))

    for left in (x, x[0], x[0, 0], np.asarray(x[0])):
        close(left @ stored, jnp.asarray(left) @ w)
    close(jax.jit(lambda x, w: x @ w)(x, stored), x @ w)
    close(jax.vmap(lambda x: x @ stored)(x), x @ w)
    tree = jax.tree.map(lambda a: a, stored)
    close(x @ tree, x @ w)

    def loss(w, x):
        return jnp.sum((x @ w).astype(jnp.float32) ** 2)

    dw, dx = jax.grad(loss, (0, 1), allow_int=True)(stored, x)
    want, want_dx = jax.grad(loss, (0, 1))(w, x)
    close(dx, want_dx)
    floats = [
        (a, b)
        for a, b in zip(jax.tree.leaves(stored), jax.tree.leaves(dw), strict=True)
        if jnp.issubdtype(a.dtype, jnp.floating)
    ]
    (values, slope), *rest = floats
    assert not rest and values.shape == slope.shape
    close(jnp.vdot(values, slope), jnp.vdot(w, want))  # the derivative along the weight itself
