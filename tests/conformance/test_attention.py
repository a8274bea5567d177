"""Every attention pattern: finite, equal to the dense softmax, composable, with rows that live."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.attention import BlockMask, block_sparse_attention, causal
from pallas_kernels._attention_cases import reference
from tests.conformance.lists import ATTENTION_PATTERNS, fast_jit

SHAPE, BLOCK, HEADS, D = (61, 61), (8, 8), (4, 2), 16


@fast_jit
def attend(q, k, v, mask):
    return block_sparse_attention(q, k, v, mask, causal=True, return_lse=True)


@fast_jit
def composed(mask, other):
    """(what is listed, what it allows) of the mask and of what `&`, `|`, `~` make of it."""
    results = mask, mask & other, mask | other, ~mask, mask & ~mask
    return [(found.block_map, found.todense()) for found in results]


@pytest.mark.parametrize("name", ATTENTION_PATTERNS)
def test_contract(name):
    pattern, key = ATTENTION_PATTERNS[name], jax.random.key(0)
    mask = pattern.build(SHAPE, BLOCK, key)
    assert isinstance(mask, BlockMask)
    assert mask.shape == SHAPE and mask.block_size == BLOCK and HEADS[0] % mask.heads == 0
    assert 0 < float(mask.density()) <= 1

    past = causal(SHAPE, BLOCK)
    states = composed(mask, past)
    for listed, dense in states:  # no block is listed for nothing, none that allows something lost
        padded = np.pad(dense, ((0, 0), (0, 0), (0, 3), (0, 3)))
        blocks = padded.reshape(*listed.shape[:2], 8, 8, 8, 8).any((3, 5))
        assert not (blocks & ~np.asarray(listed)).any()
    (_, dense), *joined = states
    dense, below = np.asarray(dense), np.tri(61, dtype=bool)
    wants = dense & below, dense | below, ~dense, np.zeros_like(dense)
    for (_, found), want in zip(joined, wants, strict=True):
        np.testing.assert_array_equal(found, want)
    sees_itself = dense[..., range(61), range(61)].all()
    assert sees_itself == pattern.sees_itself

    q, k, v = (
        jax.random.normal(jax.random.key(i), (1, SHAPE[0], heads, D))
        for i, heads in enumerate((HEADS[0], HEADS[1], HEADS[1]))
    )
    out, lse = attend(q, k, v, mask)
    assert bool(jnp.isfinite(out).all())
    want, want_lse, _ = reference(q, k, v, mask, causal=True)
    np.testing.assert_allclose(out, want, atol=2e-5)
    np.testing.assert_allclose(lse, want_lse, atol=2e-5)
    if pattern.sees_itself:
        assert bool(jnp.isfinite(lse).all())
