"""Masks worked out by hand, on eight weights or fewer."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as jsp

NAN, INF = np.nan, np.inf

# pattern, scores, density, mask
MASKS = {
    "unstructured": (jsp.Unstructured(), [[3, 1, 4], [1, 5, 9]], 0.5, [[0, 0, 1], [0, 1, 1]]),
    "unstructured keeps none": (jsp.Unstructured(), [[3, 1], [4, 1]], 0.0, [[0, 0], [0, 0]]),
    "unstructured keeps all": (jsp.Unstructured(), [[3, 1], [4, 1]], 1.0, [[1, 1], [1, 1]]),
    "ties go to the first row": (jsp.Unstructured(), [[2, 2], [2, 2]], 0.5, [[1, 1], [0, 0]]),
    "ties within a row": (jsp.Unstructured(), [[1, 2, 2], [2, 2, 9]], 0.5, [[0, 1, 1], [0, 0, 1]]),
    "ties of one third": (jsp.Unstructured(), [[2, 2, 2], [2, 2, 2]], 1 / 3, [[1, 1, 0], [0] * 3]),
    "-0.0 ties with 0.0": (jsp.Unstructured(), [[0.0, -0.0], [0.0, -1]], 0.5, [[1, 1], [0, 0]]),
    "-0.0 first ties with 0.0": (
        jsp.Unstructured(),
        [[-0.0, 0.0], [-1, -1]],
        0.25,
        [[1, 0]] + [[0, 0]],
    ),
    "NaN is never kept": (jsp.Unstructured(), [[NAN, 1], [NAN, -INF]], 0.5, [[0, 1], [0, 1]]),
    "NaN leaves too few": (jsp.Unstructured(), [[NAN, 1], [NAN, NAN]], 1.0, [[0, 1], [0, 0]]),
    "infinities rank": (jsp.Unstructured(), [[INF, -INF], [INF, 0]], 0.75, [[1, 0], [1, 1]]),
    "-inf is kept before nothing": (jsp.Unstructured(), [[-INF, -INF]], 0.5, [[1, 0]]),
    "negative scores rank": (jsp.Unstructured(), [[-3, -1, -2, -4]], 0.5, [[0, 1, 1, 0]]),
    "half rounds to even, down": (jsp.Unstructured(), [[5, 4, 3, 2, 1]], 0.5, [[1, 1, 0, 0, 0]]),
    "half rounds to even, up": (jsp.Unstructured(), [[3, 2, 1]], 0.5, [[1, 1, 0]]),
    "slices of a stack": (
        jsp.Unstructured(),
        [[[9, 8], [1, 2]], [[4, 3], [5, 6]]],
        0.5,
        [[[1, 1], [0, 0]], [[0, 0], [1, 1]]],
    ),
    "three axes are one weight": (
        jsp.Unstructured(ndim=3),
        [[[9, 8], [1, 2]], [[4, 3], [5, 6]]],
        0.5,
        [[[1, 1], [0, 0]], [[0, 0], [1, 1]]],
    ),
    "three axes, not by slice": (
        jsp.Unstructured(ndim=3),
        [[[9, 8], [7, 6]], [[4, 3], [5, 2]]],
        0.5,
        [[[1, 1], [1, 1]], [[0, 0], [0, 0]]],
    ),
    "2:4 along the inputs": (jsp.NM(2, 4), [[1], [4], [3], [2]], 0.5, [[0], [1], [1], [0]]),
    "2:4 along the outputs": (jsp.NM(2, 4, axis=-1), [[1, 4, 3, 2]], 0.5, [[0, 1, 1, 0]]),
    "1:2 along the inputs": (
        jsp.NM(1, 2),
        [[1, 9], [2, 8], [4, 6], [3, 7]],
        0.5,
        [[0, 1], [1, 0], [1, 0], [0, 1]],
    ),
    "1:2 along the outputs": (
        jsp.NM(1, 2, axis=-1),
        [[1, 9, 5, 4], [2, 8, 3, 7]],
        0.5,
        [[0, 1, 1, 0], [0, 1, 0, 1]],
    ),
    "1:2 along both": (jsp.TransposableNM(1, 2), [[5, 4], [4, 1]], 0.5, [[0, 1], [1, 0]]),
    "2:4 ties": (jsp.NM(2, 4, axis=-1), [[7, 7, 7, 7]], 0.5, [[1, 1, 0, 0]]),
    "2:4 ties with -0.0": (jsp.NM(2, 4, axis=-1), [[-0.0, 0.0, -1, 0.0]], 0.5, [[1, 1, 0, 0]]),
    "2:4 with NaN": (jsp.NM(2, 4, axis=-1), [[NAN, 1, NAN, NAN]], 0.5, [[0, 1, 0, 0]]),
    "on the way to 2:4": (jsp.NM(2, 4, axis=-1), [[1, 4, 3, 2]], 0.75, [[0, 1, 1, 1]]),
    "blocks by their sum": (
        jsp.Block((2, 2)),
        [[1, 1, 9, 0], [1, 1, 0, -6]],
        0.5,
        [[1, 1, 0, 0], [1, 1, 0, 0]],
    ),
    "flat blocks": (
        jsp.Block((1, 2)),
        [[3, 0, 1, 1], [0, 0, 2, 2]],
        0.5,
        [[1, 1, 0, 0], [0, 0, 1, 1]],
    ),
    "a NaN takes its block": (jsp.Block((1, 2)), [[NAN, 99, 0, 0]], 0.5, [[0, 0, 1, 1]]),
    "inf - inf takes its block": (jsp.Block((1, 2)), [[INF, -INF, 0, 0]], 0.5, [[0, 0, 1, 1]]),
    "output channels": (jsp.Channel(-1), [[3, 1], [0, 1]], 0.5, [[1, 0], [1, 0]]),
    "input channels": (jsp.Channel(-2), [[3, 1], [0, 5]], 0.5, [[0, 0], [1, 1]]),
    "input channels tie": (jsp.Channel(-2), [[3, 1], [0, 4]], 0.5, [[1, 1], [0, 0]]),
    "fan-in": (jsp.FanIn(), [[3, 1], [2, 4]], 0.5, [[1, 0], [0, 1]]),
    "fan-in of a column alone": (
        jsp.FanIn(),
        [[9, 1], [8, 2], [7, 3], [6, 4]],
        0.25,
        [[1, 0], [0, 0], [0, 0], [0, 1]],
    ),
}


@pytest.mark.parametrize(("pattern", "scores", "density", "mask"), MASKS.values(), ids=MASKS)
def test_make_mask(pattern, scores, density, mask):
    scores = jnp.asarray(scores, jnp.float32)
    got = jsp.make_mask(pattern, scores, density)
    assert got.dtype == bool
    np.testing.assert_array_equal(np.asarray(got).astype(int), mask)


# Banker's rounding: density, size, count
COUNTS = [
    (0.5, 1, 0),
    (0.5, 3, 2),
    (0.5, 5, 2),
    (0.5, 7, 4),
    (0.25, 2, 0),
    (0.25, 6, 2),
    (0.75, 2, 2),
    (0.3, 7, 2),
    (1 / 3, 3, 1),
    (0.1, 4, 0),
]


@pytest.mark.parametrize(("density", "size", "count"), COUNTS)
def test_counts_round_half_to_even(density, size, count):
    scores = jnp.arange(float(size))[None]
    assert int(jsp.make_mask(jsp.Unstructured(), scores, density).sum()) == count
    assert int(jsp.make_mask(jsp.Unstructured(), scores, jnp.float32(density)).sum()) == count


def test_one_density_for_each_slice():
    scores = jnp.array([[[3.0, 1, 2, 4]], [[3.0, 1, 2, 4]]])
    mask = jsp.make_mask(jsp.Unstructured(), scores, jnp.array([0.25, 0.75]))
    np.testing.assert_array_equal(mask.astype(int), [[[0, 0, 0, 1]], [[1, 0, 1, 1]]])


# measure, masks, params or None, value
MEASURES = {
    "density": (jsp.density, ({"w": [1, 0, 0, 0], "b": True},), 0.25),
    "sparsity": (jsp.sparsity, ({"w": [1, 0, 0, 0], "b": True},), 0.75),
    "density of all": (
        jsp.density,
        ({"w": [1, 0], "b": True}, {"w": [5.0, 5], "b": [1.0, 1]}),
        0.75,
    ),
    "density of nothing": (jsp.density, ({"b": True},), 1.0),
    "overlap": (jsp.overlap, ([[1, 1, 0, 0]], [[0, 1, 1, 0]]), 1 / 3),
    "overlap of empty masks": (jsp.overlap, ([[0, 0]], [[0, 0]]), 1.0),
    "churn": (jsp.churn, ([[1, 1, 0, 0]], [[0, 1, 1, 0]]), 0.5),
    "churn of nothing": (jsp.churn, ([True], [True]), 0.0),
}


@pytest.mark.parametrize(("measure", "trees", "value"), MEASURES.values(), ids=MEASURES)
def test_measures(measure, trees, value):
    def array(x):
        return jnp.asarray(x, bool if np.asarray(x).dtype.kind in "bi" else float)

    def arrays(tree):
        if isinstance(tree, dict):
            return {k: array(v) for k, v in tree.items()}
        return [array(v) for v in tree]

    got = measure(*map(arrays, trees))
    assert got.shape == () and got.dtype == jnp.float32
    np.testing.assert_allclose(got, value, rtol=1e-7)


def test_bits_of_packed_masks():
    mask = jnp.array([1, 0, 0, 0, 0, 0, 0, 1], bool)[:, None]
    packed = jsp.pack_masks([mask, jnp.array(True), mask[:4]])
    assert packed[0].dtype == jnp.uint8 and packed[0].tolist() == [[1 + 128]]
    assert packed[1].dtype == bool and packed[2].dtype == bool
    np.testing.assert_array_equal(jsp.unpack_masks(packed)[0], mask)


def test_applied_masks_clear_a_nan_and_keep_the_sign_of_zero_out():
    tree = {"w": jnp.array([NAN, -1.0, 2.0]), "b": jnp.array([NAN])}
    masks = {"w": jnp.array([False, False, True]), "b": jnp.array(True)}
    got = jsp.apply_masks(tree, masks)
    np.testing.assert_array_equal(got["w"], [0.0, 0.0, 2.0])
    assert not np.signbit(got["w"]).any() and np.isnan(got["b"]).all()
