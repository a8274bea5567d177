"""BlockSparse against the dense weight: making it, multiplying, changing trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as jsp
from pallas_kernels import plan

SHAPE, BLOCK = (48, 64), (16, 16)


@pytest.fixture(scope="module")
def dense():
    """[48, 64] in 3 x 4 blocks, of which a third is zero; row 1 and column 2 are empty."""
    rng = np.random.default_rng(0)
    chosen = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1]], bool)
    w = rng.standard_normal(SHAPE).astype(np.float32)
    return jnp.asarray(w * np.kron(chosen, np.ones(BLOCK))), jnp.asarray(chosen)


def test_from_dense_finds_its_blocks(dense):
    w, chosen = dense
    for mask in (None, chosen, w != 0):
        got = jsp.BlockSparse.from_dense(w, BLOCK, mask)
        np.testing.assert_array_equal(got.todense(), w)
        assert got.values.shape == (5, *BLOCK) and float(got.density) == pytest.approx(5 / 12)
    spare = jax.jit(lambda w: jsp.BlockSparse.from_dense(w, BLOCK, capacity=7))(w)
    np.testing.assert_array_equal(spare.todense(), w)
    assert spare.values.shape[0] == 7 and int(spare.topology.count) == 5
    short = jax.jit(lambda w: jsp.BlockSparse.from_dense(w, BLOCK, capacity=4))(w)
    np.testing.assert_array_equal(short.todense(), w.at[32:, 48:].set(0))  # the last by column, row
    stored = jsp.BlockSparse.from_dense(w, BLOCK, jnp.ones((3, 4), bool))
    assert stored.topology.fan_in == 3 and stored.values.shape[0] == 12
    np.testing.assert_array_equal(stored.todense(), w)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_both_ways(dense, dtype):
    w = dense[0].astype(dtype)
    stored = jsp.BlockSparse.from_dense(w, BLOCK)
    x, z = jnp.ones((2, 5, 48), dtype), jnp.ones((3, 64), dtype)
    tolerance = {"rtol": 1e-2 if dtype == "bfloat16" else 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(
        *(np.asarray(a, np.float32) for a in (x @ stored, x @ w)), **tolerance
    )
    np.testing.assert_allclose(
        *(np.asarray(a, np.float32) for a in (z @ stored.T, z @ w.T)), **tolerance
    )
    assert stored.T.shape == (64, 48) and stored.T.T.shape == SHAPE
    assert (x @ stored).dtype == stored.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(stored.T.todense(), w.T)
    assert stored.astype(jnp.float32).dtype == jnp.float32


def test_numpy_on_the_left_and_a_vector(dense):
    stored = jsp.BlockSparse.from_dense(dense[0], BLOCK)
    np.testing.assert_allclose(np.ones(48, np.float32) @ stored, dense[0].sum(0), rtol=1e-5)


def test_gradients_are_those_of_the_dense_weight_at_stored_blocks(dense):
    w = dense[0]
    stored = jsp.BlockSparse.from_dense(w, BLOCK)
    x = jax.random.normal(jax.random.key(0), (7, 48))

    def loss(w, x):
        return jnp.sum(jnp.sin(x @ w))

    slope, dx = jax.grad(loss, (0, 1), allow_int=True)(stored, x)
    want, want_dx = jax.grad(loss, (0, 1))(w, x)
    np.testing.assert_allclose(dx, want_dx, atol=1e-5 * float(jnp.abs(want_dx).max()))
    whole = jsp.BlockSparse(slope.values, stored.topology).todense()
    want = jnp.where(w != 0, want, 0)
    np.testing.assert_allclose(whole, want, atol=1e-5 * float(jnp.abs(want).max()))
    of_transposed = jax.grad(lambda w: jnp.sum(jnp.sin(x @ w.T.T)), allow_int=True)(stored)
    np.testing.assert_array_equal(of_transposed.values, slope.values)


def test_a_stack_of_weights():
    stack = jsp.BlockSparse.random(jax.random.key(0), (2, *SHAPE), block=BLOCK, density=0.5)
    assert stack.values.shape == (2, 8, *BLOCK) and stack.shape == SHAPE
    x = jax.random.normal(jax.random.key(1), (2, 5, 48))
    want = jnp.einsum("lmk,lkn->lmn", x, stack.todense())
    np.testing.assert_allclose(x @ stack, want, atol=1e-5)
    _, scanned = jax.lax.scan(lambda _, pair: (None, pair[0] @ pair[1]), None, (x, stack))
    np.testing.assert_allclose(scanned, want, atol=1e-5)
    again = jsp.BlockSparse.from_dense(stack.todense(), BLOCK)
    assert again.topology.fan_in == 2
    np.testing.assert_array_equal(again.todense(), stack.todense())
    with pytest.raises(ValueError, match=r"a stack \(2,\) of weights \(48, 64\) needs x of shape"):
        jnp.ones((3, 5, 48)) @ stack


def test_random_blocks_are_balanced_and_keep_the_variance():
    w = jsp.BlockSparse.random(jax.random.key(0), (512, 256), block=(16, 16), density=0.125)
    rows = w.topology.rows.reshape(16, 4)
    assert all(len(set(column)) == 4 for column in rows.tolist()) and w.topology.fan_in == 4
    y = jax.random.normal(jax.random.key(1), (256, 512)) @ w
    assert 0.9 < float(jnp.var(y)) < 1.1
    tiny = jsp.BlockSparse.random(jax.random.key(0), (32, 32), block=(16, 16), density=0.01)
    assert tiny.topology.fan_in == 1


def test_it_is_a_tree_that_jit_takes_and_gives():
    w = jsp.BlockSparse.random(jax.random.key(0), SHAPE, block=BLOCK, density=0.5)
    same = jax.jit(lambda w: w)(w)
    assert jax.tree.structure(same) == jax.tree.structure(w)
    jax.tree.map(np.testing.assert_array_equal, same, w)
    abstract = jax.eval_shape(lambda w: w.T, w)
    assert abstract.shape == (64, 48)


def test_any_topology_multiplies(dense):
    """Slots in no order, some of them not in use, with NaN in those."""
    rows, cols = jnp.array([2, 9, 0, 2]), jnp.array([3, 0, 1, 0])
    values = jax.random.normal(jax.random.key(0), (4, *BLOCK)).at[1].set(jnp.nan)
    w = jsp.BlockSparse(values, plan(rows, cols, (3, 4)))
    x = jnp.ones((2, 48))
    np.testing.assert_allclose(x @ w, x @ w.todense(), atol=1e-5)
    assert bool(jnp.isfinite(w.todense()).all())


def test_errors(dense):
    w, chosen = dense
    with pytest.raises(ValueError, match=r"blocks of \(16, 24\) do not divide .*\(48, 64\)"):
        jsp.BlockSparse.from_dense(w, (16, 24))
    with pytest.raises(ValueError, match=r"5 blocks are to be stored, but the capacity is 4"):
        jsp.BlockSparse.from_dense(w, BLOCK, capacity=4)
    with pytest.raises(ValueError, match=r"within the block at block row 2, block column 1"):
        jsp.BlockSparse.from_dense(w, BLOCK, jnp.ones(SHAPE, bool).at[40, 20].set(False))
    with pytest.raises(ValueError, match=r"mask must be bool, .* got bool \(4, 3\)"):
        jsp.BlockSparse.from_dense(w, BLOCK, chosen.T)
    with pytest.raises(ValueError, match="needs capacity= under jit"):
        jax.jit(lambda w: jsp.BlockSparse.from_dense(w, BLOCK))(w)
    with pytest.raises(ValueError, match=r"density is the share of blocks stored, in \(0, 1\]"):
        jsp.BlockSparse.random(jax.random.key(0), SHAPE, block=BLOCK, density=0)
