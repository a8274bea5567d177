"""Masks: applied, measured and packed, against numpy."""

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import jaxsparse as jsp
from tests.conformance.lists import TREES, make_params

SHAPES = [(8, 1), (16, 3), (2, 8, 4), (2, 3, 24, 2)]  # packed
ODD = [(7, 3), (4, 8), (8,), (), (2, 12, 3)]  # left as they are


@pytest.mark.parametrize("shape", SHAPES + ODD)
@hypothesis.given(data=st.data())
def test_packing_and_back(shape, data):
    mask = data.draw(hnp.arrays(bool, shape))
    with jax.numpy_dtype_promotion("strict"):
        packed = jsp.pack_masks([jnp.asarray(mask)])[0]
        np.testing.assert_array_equal(jsp.unpack_masks([packed])[0], mask)
    if shape in ODD:
        assert packed.dtype == bool and packed.shape == shape
        return
    assert packed.dtype == jnp.uint8 and packed.ndim == len(shape)
    assert packed.shape == (*shape[:-2], shape[-2] // 8, shape[-1])
    np.testing.assert_array_equal(packed, np.packbits(mask, axis=-2, bitorder="little"))


def test_a_mask_tree_of_any_kind_packs_to_an_eighth():
    for tree in TREES:
        masks = jsp.prune(make_params(tree), jsp.uniform(0.5))[1]
        packed = jsp.pack_masks(masks)
        assert jax.tree.structure(packed) == jax.tree.structure(masks)
        size = sum(m.nbytes for m in jax.tree.leaves(masks) if m.ndim)
        assert sum(m.nbytes for m in jax.tree.leaves(packed) if m.ndim) * 8 == size
        jax.tree.map(np.testing.assert_array_equal, jsp.unpack_masks(packed), masks)


def test_like_packs_the_same_leaves():
    masks = {"a": jnp.ones((8, 2), bool), "b": jnp.ones((8, 2), bool), "c": jnp.array(True)}
    like = {**jsp.pack_masks(masks), "b": masks["b"]}
    again = jsp.pack_masks(masks, like=like)
    assert {k: v.dtype for k, v in again.items()} == {k: v.dtype for k, v in like.items()}


@hypothesis.given(hnp.arrays(bool, (3, 4)), hnp.arrays(bool, (3, 4)))
def test_measures_are_those_of_numpy(a, b):
    old, new = [jnp.asarray(a), jnp.array(True)], [jnp.asarray(b), jnp.array(True)]
    np.testing.assert_allclose(jsp.density(old), a.mean(), rtol=1e-6)
    np.testing.assert_allclose(jsp.sparsity(old), 1 - a.mean(), atol=1e-6)
    np.testing.assert_allclose(jsp.churn(old, new), (a ^ b).mean(), rtol=1e-6)
    union = (a | b).sum()
    want = (a & b).sum() / union if union else 1.0
    np.testing.assert_allclose(jsp.overlap(old, new), want, rtol=1e-6)
    params = [jnp.ones((3, 4)), jnp.ones(5)]
    np.testing.assert_allclose(jsp.density(old, params), (a.sum() + 5) / 17, rtol=1e-6)


def test_a_mask_that_broadcasts_counts_every_weight_it_covers():
    masks, params = [jnp.array([[True], [False]])], [jnp.ones((2, 6))]
    assert float(jsp.density(masks, params)) == 0.5
    np.testing.assert_array_equal(
        jsp.apply_masks(params, masks)[0], np.repeat([[1.0], [0.0]], 6, 1)
    )


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.complex64]
)
def test_apply_keeps_the_dtype_and_its_zeros_are_zeros(dtype):
    tree = {"w": jnp.array([[-2, 3], [5, -7]], dtype), "step": jnp.array(3)}
    masks = {"w": jnp.array([[True, False], [False, True]]), "step": jnp.array(True)}
    with jax.numpy_dtype_promotion("strict"):
        got = jax.jit(jsp.apply_masks)(tree, masks)
    assert got["w"].dtype == dtype and int(got["step"]) == 3
    np.testing.assert_array_equal(got["w"].astype(np.complex64), [[-2, 0], [0, -7]])


def test_apply_masks_on_every_tree():
    for tree in TREES:
        params = make_params(tree)
        pruned, masks = jsp.prune(params, jsp.uniform(0.75))
        applied = jsp.apply_masks(params, masks)
        assert jax.tree.structure(applied) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_array_equal, applied, pruned)
