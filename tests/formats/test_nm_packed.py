"""NMPacked against masks of `make_mask`, numpy and a hand-worked packing of eight weights."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxsparse as jsp
from jaxsparse.formats import NMPacked, SparseWeight

COLUMN = np.array([[1, -5, 3, 4, 0, 2, -2, 1]], np.float32).T


def weights(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def by_hand(w, n, m, axis, stride):
    """The largest n of each group, sorted index by index."""
    w = np.asarray(w, np.float64)
    kept = np.zeros(w.shape, bool)
    flat, mask = np.moveaxis(w, axis, -1), np.moveaxis(kept, axis, -1)
    for at in np.ndindex(flat.shape[:-1]):
        for first in range(flat.shape[-1]):
            if first // stride % m:
                continue
            group = [first + stride * i for i in range(m)]
            best = sorted(group, key=lambda i: (-abs(flat[at][i]), i))[:n]
            mask[at][best] = True
    return np.where(kept, w, 0)


@pytest.mark.parametrize(
    ("stride", "values", "indices", "dense"),
    [
        # Groups of rows 0-3 and 4-7: places 1, 3 and 1, 2, two bits each: 1 + 3*4 + 1*16 + 2*64.
        (1, [-5, 4, 2, -2], [157], [0, -5, 0, 4, 0, 2, -2, 0]),
        # Rows 0 2 4 6 and 1 3 5 7: places 1, 3 and 0, 1; first members 3, -5, second -2, 4.
        (2, [3, -5, -2, 4], [1 + 3 * 4, 0 + 1 * 4], [0, -5, 3, 4, 0, 0, -2, 0]),
    ],
)
def test_eight_weights_by_hand(stride, values, indices, dense):
    w = NMPacked.from_dense(COLUMN, 2, 4, stride=stride)
    np.testing.assert_array_equal(w.values[:, 0], values)
    np.testing.assert_array_equal(w.indices[:, 0], indices)
    np.testing.assert_array_equal(w.todense()[:, 0], dense)
    assert w.indices.dtype == jnp.uint8
    across = NMPacked.from_dense(COLUMN.T, 2, 4, axis=-1, stride=stride)
    np.testing.assert_array_equal(across.values[0], values)
    np.testing.assert_array_equal(across.indices[0], indices)
    np.testing.assert_array_equal(across.todense()[0], dense)


CASES = [
    # n, m, axis, stride, shape
    (2, 4, -2, 1, (16, 3)),
    (2, 4, -2, 4, (2, 16, 3)),
    (1, 4, -1, 1, (3, 12)),
    (1, 2, -2, 3, (12, 2)),
    (3, 5, -1, 2, (2, 2, 20)),
    (1, 1, -2, 1, (3, 2)),
    (2, 40, -2, 1, (80, 2)),  # beyond 16 places: a byte each
]


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize(("n", "m", "axis", "stride", "shape"), CASES)
def test_the_largest_of_each_group_are_kept(n, m, axis, stride, shape):
    dense = jnp.asarray(np.random.default_rng(0).integers(-4, 5, shape), jnp.float32)
    w = NMPacked.from_dense(dense, n, m, axis=axis, stride=stride)
    want = by_hand(dense, n, m, axis, stride)
    np.testing.assert_array_equal(w.todense(), want)
    assert w.shape == shape[-2:] and w.dtype == jnp.float32 and w.density == n / m
    assert w.nbytes == w.values.nbytes + w.indices.nbytes
    assert w.values.size * m == dense.size * n
    np.testing.assert_array_equal(w.T.todense(), want.swapaxes(-1, -2))
    assert w.T.shape == shape[:-3:-1]
    x = weights(*shape[:-2], 5, shape[-2])
    np.testing.assert_allclose(x @ w, np.asarray(x) @ want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("n", "m", "stride", "size", "values_in_a_byte"),
    [(1, 2, 1, 32, 8), (2, 4, 1, 32, 4), (2, 4, 2, 32, 4), (2, 4, 8, 32, 2), (4, 8, 1, 32, 2)]
    + [(1, 4, 8, 32, 1), (1, 20, 1, 40, 1)],
)
def test_places_share_bytes(n, m, stride, size, values_in_a_byte):
    w = NMPacked.from_dense(weights(size, 3), n, m, stride=stride)
    assert w.values.shape == (size * n // m, 3)
    assert w.indices.shape == (size * n // m // values_in_a_byte, 3)


def test_a_mask_of_the_pattern_is_stored_as_it_is():
    dense, scores = weights(2, 16, 6), weights(2, 16, 6, seed=1)
    mask = jsp.make_mask(jsp.NM(2, 4), scores, 0.5)
    w = NMPacked.from_dense(dense, 2, 4, mask=mask)
    np.testing.assert_array_equal(w.todense(), jnp.where(mask, dense, 0))
    jitted = jax.jit(lambda w, mask: NMPacked.from_dense(w, 2, 4, mask=mask))(dense, mask)
    np.testing.assert_array_equal(jitted.indices, w.indices)
    row = jnp.arange(16)[:, None] % 4 < 2  # broadcast over columns and slices
    w = NMPacked.from_dense(dense, 2, 4, mask=row)
    np.testing.assert_array_equal(w.todense(), jnp.where(row, dense, 0))


def test_a_group_that_keeps_fewer_is_filled_up_with_zeros():
    mask = np.zeros((8, 1), bool)
    mask[3] = True
    w = NMPacked.from_dense(COLUMN, 2, 4, mask=mask)
    np.testing.assert_array_equal(w.values[:, 0], [0, 4, 0, 0])  # rows 0, 3 and 4, 5
    assert w.indices[0, 0] == 0 + 3 * 4 + 0 * 16 + 1 * 64
    np.testing.assert_array_equal(w.todense(), np.where(mask, COLUMN, 0))
    nan = jnp.where(jnp.arange(8)[:, None] < 3, jnp.nan, COLUMN)  # absent: one number is left
    assert NMPacked.from_dense(nan, 2, 4).values[:, 0].tolist() == [0, 4, 2, -2]


def test_a_mask_that_is_not_traced_is_checked_under_jit_too():
    mask = np.arange(8)[:, None] != 0
    with pytest.raises(ValueError, match="the mask keeps 4 of a group"):
        jax.jit(lambda w: NMPacked.from_dense(w, 2, 4, mask=mask))(COLUMN)


def test_a_traced_mask_that_keeps_too_much_keeps_the_first():
    pack = jax.jit(lambda w, mask: NMPacked.from_dense(w, 2, 4, mask=mask))
    w = pack(COLUMN, jnp.arange(8)[:, None] != 0)
    np.testing.assert_array_equal(w.todense()[:, 0], [0, -5, 3, 0, 0, 2, 0, 0])


@hypothesis.given(
    seed=st.integers(0, 10**6),
    how=st.sampled_from(
        [
            ((2, 4), -2, 1, jnp.float32),
            ((3, 4), -2, 2, jnp.bfloat16),
            ((1, 2), -1, 1, jnp.bfloat16),
        ]
    ),
)
def test_the_product_is_that_of_the_dense_weight(seed, how):
    (n, m), axis, stride, dtype = how
    w = NMPacked.from_dense(weights(8, 8, seed=seed, dtype=dtype), n, m, axis=axis, stride=stride)
    x = weights(3, 8, seed=seed + 1, dtype=dtype)
    y = x @ w
    assert y.dtype == w.dtype == w.todense().dtype == dtype
    np.testing.assert_array_equal(y, x @ w.todense())


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize(
    ("axis", "stride", "dtype"),
    [(-2, 1, jnp.float32), (-2, 2, jnp.bfloat16), (-1, 1, jnp.bfloat16), (-1, 4, jnp.float32)],
)
def test_gradients_are_those_of_the_masked_dense_weight(axis, stride, dtype):
    dense, x, g = (weights(16, 16, seed=s, dtype=dtype) for s in range(3))
    w = NMPacked.from_dense(dense, 2, 4, axis=axis, stride=stride)
    mask = np.asarray(w.todense()) != 0

    def packed(values, x):
        return jnp.sum(g * (x @ dataclasses.replace(w, values=values)))

    def masked(dense, x):
        return jnp.sum(g * (x @ jnp.where(mask, dense, jnp.zeros((), dtype))))

    values, dx = jax.jit(jax.grad(packed, (0, 1)))(w.values, x)
    want, want_dx = jax.jit(jax.grad(masked, (0, 1)))(dense, x)
    assert values.dtype == dtype
    np.testing.assert_array_equal(dataclasses.replace(w, values=values).todense(), want)
    np.testing.assert_array_equal(dx, want_dx)

    def through_packing(dense):
        w = NMPacked.from_dense(dense, 2, 4, axis=axis, stride=stride)
        return jnp.sum(g * (x @ w))

    np.testing.assert_array_equal(jax.jit(jax.grad(through_packing))(dense), want)


def test_no_dense_weight_is_kept_for_the_backward_pass():
    w = NMPacked.from_dense(weights(32, 32), 2, 4)

    def loss(values, x):
        return jnp.sum(jnp.tanh(x @ dataclasses.replace(w, values=values)))

    _, pullback = jax.vjp(loss, w.values, weights(2, 32))
    assert all(jnp.size(leaf) < 32 * 32 for leaf in jax.tree.leaves(pullback))


def test_stacks_vmap_scan_and_jit_agree():
    dense, x = weights(3, 16, 4), weights(3, 2, 5, 16, seed=1)
    w = NMPacked.from_dense(dense, 2, 4, stride=2)
    want = jnp.stack([x[i] @ NMPacked.from_dense(dense[i], 2, 4, stride=2) for i in range(3)])
    assert w.shape == (16, 4) and want.shape == (3, 2, 5, 4)
    multiply = lambda x, w: x @ w  # noqa: E731
    for y in (
        x @ w,
        jax.jit(multiply)(x, w),
        jax.vmap(multiply)(x, w),
        jax.lax.scan(lambda _, xw: (None, multiply(*xw)), None, (x, w))[1],
        jax.vmap(lambda x, d: x @ NMPacked.from_dense(d, 2, 4, stride=2))(x, dense),
    ):
        np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6)


def test_numpy_vectors_and_wider_inputs_on_the_left():
    w = NMPacked.from_dense(weights(8, 4, dtype=jnp.bfloat16), 2, 4)
    x = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)
    y = x @ w
    assert isinstance(y, jax.Array) and y.dtype == jnp.float32
    np.testing.assert_allclose(y, x @ np.asarray(w.todense(), np.float32), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x[0] @ w, y[0], rtol=1e-5, atol=1e-5)


def test_it_is_a_pytree_and_a_sparse_weight():
    w = NMPacked.from_dense(COLUMN, 2, 4, stride=2)
    assert isinstance(w, SparseWeight)
    leaves, treedef = jax.tree.flatten(w)
    again = treedef.unflatten(leaves)
    assert (again.n, again.m, again.axis, again.stride) == (2, 4, -2, 2)
    assert jax.tree.leaves(again)[0] is w.values and jax.tree.leaves(again)[1] is w.indices
    abstract = jax.eval_shape(lambda d: NMPacked.from_dense(d, 2, 4, stride=2), COLUMN)
    assert abstract.shape == (8, 1) and jax.tree.structure(abstract) == treedef


def test_empty_weights():
    for shape in ((0, 3), (8, 0), (0, 8, 2)):
        w = NMPacked.from_dense(jnp.zeros(shape), 2, 4)
        assert w.todense().shape == shape and w.shape == shape[-2:]


@pytest.mark.parametrize("explicit", [False, True])
def test_a_sharded_weight_keeps_its_sharding(devices, explicit):
    kind = AxisType.Explicit if explicit else AxisType.Auto
    mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,), devices=devices[:4])
    dense = weights(64, 8)
    want = NMPacked.from_dense(dense, 2, 4)
    for spec in (PartitionSpec("x", None), PartitionSpec(None, "x")):
        with jax.set_mesh(mesh):
            sharded = jax.device_put(dense, NamedSharding(mesh, spec))
            w = jax.jit(lambda d: NMPacked.from_dense(d, 2, 4))(sharded)
            assert not explicit or jax.typeof(w.values).sharding.spec == spec
            back = jax.jit(lambda w: w.todense())(w)
        np.testing.assert_array_equal(w.indices, want.indices)
        np.testing.assert_array_equal(back, want.todense())


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((COLUMN[:6], 2, 4), {}, ValueError, r"multiple of m \* stride = 4; got \(6, 1\). Pad it"),
        ((COLUMN, 2, 4), {"stride": 4}, ValueError, r"= 16; got \(8, 1\).* a smaller stride"),
        ((COLUMN, 2, 4), {"stride": 0}, ValueError, "1 or more; got 0"),
        ((COLUMN, 5, 4), {}, ValueError, "0 < n <= m; got n=5, m=4"),
        ((COLUMN, 2, 4), {"axis": 0}, ValueError, r"-2 \(inputs\) or -1 \(outputs\); got 0"),
        ((COLUMN, 2, 512), {}, ValueError, "m <= 256; got m=512"),
        ((COLUMN[:, 0], 2, 4), {}, ValueError, r"at least 2 axes.*got \(8,\)"),
        ((COLUMN, 2, 4), {"mask": COLUMN}, TypeError, "bool, True = kept; got float32"),
        ((COLUMN, 2, 4), {"mask": np.ones((4, 1), bool)}, ValueError, r"broadcast.*\(4, 1\)"),
        (
            (COLUMN, 2, 4),
            {"mask": np.arange(8)[:, None] > 4},
            ValueError,
            "at most 2 of every 4 entries along axis -2, consecutive; the mask keeps 3 of a group",
        ),
        ((COLUMN, 2, 4), {"mask": True, "stride": 2}, ValueError, "each 2 apart; the mask keeps 4"),
    ],
)
def test_errors_say_the_rule_the_value_and_the_mend(arguments, options, error, message):
    with pytest.raises(error, match=message):
        NMPacked.from_dense(*arguments, **options)


def test_an_input_that_does_not_fit_is_named():
    w = NMPacked.from_dense(weights(3, 8, 2), 2, 4)
    with pytest.raises(ValueError, match=r"needs x of shape \(3, ..., 8\); got \(2, 8\). Scan"):
        jnp.ones((2, 8)) @ w
    with pytest.raises(ValueError, match=r"needs x of shape \(..., 8\); got \(2, 7\)."):
        jnp.ones((2, 7)) @ NMPacked.from_dense(COLUMN, 2, 4)
