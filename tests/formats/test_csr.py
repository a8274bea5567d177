"""CSR against scipy, masked dense weights and a hand-worked packing."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from hypothesis import strategies as st

from jaxsparse.formats import CSR, SparseWeight


def weights(*shape, seed=0, sparsity=0.0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    w = np.where(rng.random(shape) < sparsity, 0, rng.normal(size=shape))
    return jnp.asarray(w, dtype)


def test_eight_weights_by_hand():
    dense = np.array([[0, 7, 0, 0], [5, 8, 0, 6]], np.float32)
    w = CSR.from_dense(dense)
    pad = [2] * 6  # K = 2: there is no such row
    np.testing.assert_array_equal(w.columns, [0, 1, 3])
    np.testing.assert_array_equal(w.indices, [[1, 2, *pad], [0, 1, *pad], [1, 2, *pad]])
    np.testing.assert_array_equal(w.values[:, :2], [[5, 0], [7, 8], [6, 0]])
    assert (w.values[:, 2:] == 0).all()
    assert w.indices.dtype == w.columns.dtype == jnp.uint16
    assert w.count == 4 and w.density == 0.5 and w.nbytes == 3 * (8 * 4 + 8 * 2 + 2)
    np.testing.assert_array_equal(w.todense(), dense)
    roomy = CSR.from_dense(dense, capacity=6)  # 6 entries fill up to 4 columns, in groups of 8
    assert roomy.columns.tolist() == [0, 1, 3, 4] and roomy.indices[3].tolist() == [2] * 8
    np.testing.assert_array_equal(roomy.todense(), dense)


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize(
    ("shape", "sparsity"),
    [((37, 21), 0.0), ((37, 21), 0.9), ((37, 21), 1.0), ((1, 5), 0.5), ((5, 1), 0.5)],
)
def test_products_are_those_of_scipy(shape, sparsity):
    dense = weights(*shape, sparsity=sparsity)
    w, oracle = CSR.from_dense(dense), scipy.sparse.csc_array(np.asarray(dense))
    order = np.asarray(w.indices)[np.asarray(w.indices) < shape[0]]
    np.testing.assert_array_equal(order, oracle.indices)
    np.testing.assert_array_equal(w.todense(), dense)
    assert w.count == oracle.nnz and w.shape == shape
    for rows in ((), (2, 3)):
        x = weights(*rows, shape[0], seed=1)
        want = (np.asarray(x).reshape(-1, shape[0]) @ oracle).reshape(*rows, shape[1])
        np.testing.assert_allclose(x @ w, want, rtol=1e-5, atol=1e-5)


@hypothesis.given(
    seed=st.integers(0, 10**6),
    sparsity=st.floats(0, 1),
    rows=st.sampled_from([1, 3]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_the_product_is_that_of_the_dense_weight(seed, sparsity, rows, dtype):
    dense = weights(20, 6, seed=seed, sparsity=sparsity, dtype=dtype)
    dense = dense.at[:, 2].set(0).at[3].set(0)  # 95 others
    w = CSR.from_dense(dense, capacity=100)
    np.testing.assert_array_equal(w.todense(), dense)
    x = weights(rows, 20, seed=seed + 1, dtype=dtype)
    y = x @ w
    assert y.dtype == w.dtype == w.todense().dtype == dtype
    want = np.asarray(x, np.float64) @ np.asarray(dense, np.float64)
    tolerance = 1e-2 if dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=tolerance, atol=tolerance)


def test_sums_are_float32_whatever_the_dtype():
    """256 ones and 1 more are 257 in float32, and 256 if they are added in bfloat16."""
    w = CSR.from_dense(jnp.ones((259, 1), jnp.bfloat16))
    for rows in (1, 2):
        y = jnp.ones((rows, 259), jnp.bfloat16) @ w
        assert y.dtype == jnp.bfloat16 and y[0, 0] == 260  # 259 to 8 bits
    assert (np.ones((1, 259), np.float32) @ w).tolist() == [[259.0]]


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize(("rows", "dtype"), [(1, jnp.float32), (4, jnp.bfloat16)])
def test_gradients_are_those_of_the_masked_dense_weight(rows, dtype):
    dense, x, g = weights(30, 7, dtype=dtype), weights(rows, 30, dtype=dtype), weights(rows, 7)
    mask = np.random.default_rng(3).random((30, 7)) < 0.3
    mask[:, 4] = mask[5] = False
    w = CSR.from_dense(dense, mask, capacity=100)
    zero = jnp.zeros((), dtype)

    def stored(values, x):
        return jnp.sum(g * (x @ dataclasses.replace(w, values=values)).astype(jnp.float32))

    def masked(dense, x):
        y = jnp.matmul(x, jnp.where(mask, dense, zero), preferred_element_type=jnp.float32)
        return jnp.sum(g * y.astype(dtype).astype(jnp.float32))

    def through_storing(dense):
        w = CSR.from_dense(dense, mask)
        return jnp.sum(g * (x @ w).astype(jnp.float32))

    values, dx = jax.jit(jax.grad(stored, (0, 1)))(w.values, x)
    want, want_dx = jax.jit(jax.grad(masked, (0, 1)))(dense, x)
    assert values.dtype == dx.dtype == dtype
    empty = np.asarray(w.indices) == 30
    assert (np.asarray(values)[empty] == 0).all() and empty.sum() + mask.sum() == values.size
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == jnp.bfloat16 else {"atol": 1e-5}
    f32 = lambda a: np.asarray(a, np.float32)  # noqa: E731
    got = dataclasses.replace(w, values=values).todense()
    np.testing.assert_allclose(f32(got), f32(want), **tolerance)
    np.testing.assert_allclose(f32(dx), f32(want_dx), **tolerance)
    through = np.asarray(jax.jit(jax.grad(through_storing))(dense))
    assert (through[~mask] == 0).all()
    np.testing.assert_allclose(f32(through), f32(want), **tolerance)


def test_a_mask_keeps_zeros_and_drops_numbers():
    dense = jnp.array([[0.0, 1.0], [2.0, 3.0], [jnp.nan, 4.0]])
    w = CSR.from_dense(dense, jnp.array([[True, False], [False, True], [False, False]]))
    assert w.count == 2
    np.testing.assert_array_equal(w.todense(), [[0, 0], [0, 3], [0, 0]])
    np.testing.assert_array_equal(CSR.from_dense(dense).todense(), dense)  # NaN is no zero
    rows = CSR.from_dense(dense, np.array([[False], [True], [False]]))
    np.testing.assert_array_equal(rows.todense(), [[0, 0], [2, 3], [0, 0]])


@pytest.mark.parametrize("capacity", [0, 3, 10, 11])
def test_under_jit_the_last_entries_beyond_the_capacity_are_left_out(capacity):
    mask = np.random.default_rng(0).permutation(40).reshape(20, 2) < 11
    dense = np.where(mask, weights(20, 2), 0)
    w = jax.jit(lambda d: CSR.from_dense(d, capacity=capacity))(dense)
    column_major = dense.T.reshape(-1).copy()
    column_major[np.flatnonzero(column_major)[capacity:]] = 0
    np.testing.assert_array_equal(w.todense(), column_major.reshape(2, 20).T)
    assert w.count == min(capacity, 11)


def test_a_mask_that_is_not_traced_needs_no_capacity_under_jit():
    dense, mask = weights(5, 3), np.eye(5, 3, dtype=bool)
    w = jax.jit(lambda d: CSR.from_dense(d, mask))(dense)
    np.testing.assert_array_equal(w.todense(), jnp.where(mask, dense, 0))
    with pytest.raises(ValueError, match="the mask keeps 3"):
        jax.jit(lambda d: CSR.from_dense(d, mask, capacity=2))(dense)


def test_a_capacity_is_enough_for_any_mask():
    store = jax.jit(lambda d, mask: CSR.from_dense(d, mask, capacity=12))
    dense = weights(9, 8)
    spread = np.zeros((9, 8), bool)
    spread.reshape(-1)[np.random.default_rng(0).choice(72, 12, replace=False)] = True
    full = np.zeros((9, 8), bool)
    full[:, 0] = full[:3, 7] = True  # a column of 9: two groups
    one_each = np.zeros((9, 8), bool)
    one_each[0] = one_each[4, :4] = True
    for mask in (spread, full, one_each):
        np.testing.assert_array_equal(store(dense, mask).todense(), jnp.where(mask, dense, 0))


def test_stacks_vmap_scan_and_jit_agree():
    dense, x = weights(3, 16, 4, sparsity=0.7), weights(3, 2, 5, 16, seed=1)
    w = CSR.from_dense(dense)
    want = jnp.einsum("sabk,skn->sabn", x, dense)
    assert w.shape == (16, 4) and w.count.shape == w.density.shape == (3,)
    np.testing.assert_array_equal(w.todense(), dense)
    multiply = lambda x, w: x @ w  # noqa: E731
    for y in (
        x @ w,
        jax.jit(multiply)(x, w),
        jax.vmap(multiply)(x, w),
        jax.lax.scan(lambda _, xw: (None, multiply(*xw)), None, (x, w))[1],
        jax.vmap(lambda x, d: x @ CSR.from_dense(d, capacity=30))(x, dense),
        jax.vmap(multiply, (1, None), 1)(x, w),
    ):
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_more_rows_or_columns_than_16_bits():
    dense = np.zeros((70000, 2), np.float32)
    dense[69999, 1] = dense[2, 0] = 3
    w = CSR.from_dense(dense)
    assert w.indices.dtype == jnp.int32 and w.columns.dtype == jnp.uint16
    np.testing.assert_array_equal(w.todense(), dense)
    np.testing.assert_array_equal(np.arange(70000, dtype=np.float32) @ w, [6, 3 * 69999])
    w = CSR.from_dense(dense.T)
    assert w.indices.dtype == jnp.uint16 and w.columns.dtype == jnp.int32
    np.testing.assert_array_equal(w.todense(), dense.T)


def test_it_is_a_pytree_and_a_sparse_weight():
    w = CSR.from_dense(weights(8, 3, sparsity=0.5))
    assert isinstance(w, SparseWeight)
    leaves, treedef = jax.tree.flatten(w)
    again = treedef.unflatten(leaves)
    assert again.shape == (8, 3) and len(leaves) == 3
    assert all(a is b for a, b in zip(jax.tree.leaves(again), leaves, strict=True))
    np.testing.assert_array_equal(jax.jit(lambda w: w)(w).todense(), w.todense())


def test_empty_weights():
    for shape in ((0, 3), (8, 0), (0, 8, 2)):
        w = CSR.from_dense(jnp.zeros(shape))
        assert w.todense().shape == shape and w.shape == shape[-2:]
        y = jnp.ones((*shape[:-2], 2, shape[-2])) @ w
        np.testing.assert_array_equal(y, jnp.zeros((*shape[:-2], 2, shape[-1])))
    with pytest.raises(ValueError, match="at most so many"):
        CSR.from_dense(jnp.eye(3), capacity=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.eye(4), None, 3), ValueError, r"capacity=3.*keeps 4 of \(4, 4\). Raise the capacity"),
        ((np.ones(4),), ValueError, r"\[..., K, N\] with K \* N < 2\*\*31; got \(4,\)"),
        ((np.eye(4), np.eye(4)), TypeError, "bool, True = kept; got float32. Write mask != 0"),
        ((np.eye(4), np.ones((3, 4), bool)), ValueError, r"broadcast.*\(4, 4\); got \(3, 4\)"),
        ((np.eye(4), None, -1), ValueError, "0 or more; got -1"),
    ],
)
def test_errors_say_the_rule_the_value_and_the_mend(arguments, error, message):
    with pytest.raises(error, match=message):
        CSR.from_dense(*arguments)


def test_what_cannot_be_done_says_what_can():
    with pytest.raises(TypeError, match="this mask is traced. Give capacity="):
        jax.jit(CSR.from_dense)(jnp.eye(2))
    w = CSR.from_dense(jnp.eye(2))
    with pytest.raises(AttributeError, match="no transpose; write"):
        w.T  # noqa: B018
    with pytest.raises(ValueError, match=r"needs x of shape \(..., 2\); got \(3,\)"):
        jnp.ones(3) @ w
    with pytest.raises(ValueError, match=r"a stack \(5,\) of weights \(2, 2\) needs x of shape"):
        jnp.ones((3, 2)) @ CSR.from_dense(jnp.ones((5, 2, 2)))
