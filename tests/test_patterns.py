"""Patterns against lists of groups and units, written out index by index."""

import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import jaxsparse as jsp
from jaxsparse import testing
from jaxsparse.patterns import kept_units, units

K, N = 8, 6


def every(*sizes):
    return list(itertools.product(*map(range, sizes)))


# pattern -> groups of units of indices (row, column), in the order in which ties are broken
GROUPS = {
    jsp.Unstructured(): [[[at] for at in every(K, N)]],
    jsp.NM(2, 4): [[[(4 * g + i, c)] for i in range(4)] for g in range(K // 4) for c in range(N)],
    jsp.NM(1, 3, axis=-1): [
        [[(r, 3 * g + i)] for i in range(3)] for r in range(K) for g in range(N // 3)
    ],
    jsp.Block((4, 2)): [
        [[(4 * i + a, 2 * j + b) for a, b in every(4, 2)] for i, j in every(K // 4, N // 2)]
    ],
    jsp.Channel(-1): [[[(r, c) for r in range(K)] for c in range(N)]],
    jsp.Channel(-2): [[[(r, c) for c in range(N)] for r in range(K)]],
    jsp.FanIn(): [[[(r, c)] for r in range(K)] for c in range(N)],
}


def by_lists(groups, scores, density):
    """Sort each group by the sum of its units, first index first, and keep the top ones."""
    mask = np.zeros(scores.shape, bool)
    for group in groups:
        sums = [sum(float(scores[at]) for at in unit) for unit in group]
        best = sorted(range(len(group)), key=lambda u: (-sums[u], u))
        for u in best[: round(density * len(group))]:
            for at in group[u]:
                mask[at] = True
    return mask


@pytest.mark.parametrize("pattern", GROUPS, ids=repr)
@hypothesis.given(
    seed=st.integers(0, 10**6), density=st.sampled_from([0.0, 0.1, 0.25, 0.5, 2 / 3, 0.9, 1.0])
)
def test_masks_are_those_of_the_lists(pattern, seed, density):
    scores = np.random.default_rng(seed).integers(-4, 5, (2, K, N)).astype(np.float32)
    with jax.numpy_dtype_promotion("strict"):
        mask = np.asarray(jsp.make_mask(pattern, scores, density))
    for i in range(2):
        np.testing.assert_array_equal(mask[i], by_lists(GROUPS[pattern], scores[i], density))


@pytest.mark.parametrize("pattern", GROUPS, ids=repr)
def test_a_stack_of_stacks_is_handled_slice_by_slice(pattern):
    scores = np.random.default_rng(0).normal(size=(2, 3, K, N)).astype(np.float32)
    mask = jsp.make_mask(pattern, scores, 0.5)
    for i, j in every(2, 3):
        np.testing.assert_array_equal(mask[i, j], jsp.make_mask(pattern, scores[i, j], 0.5))


@pytest.mark.parametrize("pattern", GROUPS, ids=repr)
def test_more_density_keeps_what_was_kept(pattern):
    scores = np.random.default_rng(1).integers(0, 3, (K, N)).astype(np.float32)
    masks = [np.asarray(jsp.make_mask(pattern, scores, d)) for d in np.linspace(0, 1, 9).tolist()]
    for few, many in itertools.pairwise(masks):
        assert not (few & ~many).any()


@pytest.mark.parametrize("pattern", GROUPS, ids=repr)
def test_units_counts_the_rivals_of_a_group(pattern):
    assert {len(group) for group in GROUPS[pattern]} == {units(pattern, (K, N))}


def test_a_convolution_is_one_weight_of_four_axes():
    scores = np.random.default_rng(2).integers(0, 9, (2, 3, 3, 4, 5)).astype(np.float32)
    flat = scores.reshape(2, 36, 5)
    whole = jsp.make_mask(jsp.Unstructured(ndim=4), scores, 0.3)
    want = jsp.make_mask(jsp.Unstructured(), flat, 0.3)
    np.testing.assert_array_equal(whole.reshape(2, 36, 5), want)
    np.testing.assert_array_equal(
        jsp.make_mask(jsp.FanIn(ndim=4), scores, 0.25).reshape(2, 36, 5),
        jsp.make_mask(jsp.FanIn(), flat, 0.25),
    )
    np.testing.assert_array_equal(
        jsp.make_mask(jsp.Channel(-1, ndim=4), scores, 0.4).reshape(2, 36, 5),
        jsp.make_mask(jsp.Channel(-1), flat, 0.4),
    )
    inputs = jsp.make_mask(jsp.Channel(-2, ndim=4), scores, 0.5)
    assert (inputs == inputs[:, :1, :1, :, :1]).all() and (inputs.sum((1, 2, 3, 4)) == 90).all()


def test_blocks_add_in_float32_whatever_the_dtype():
    """256 ones are 256 in bf16 too only if they are added in a wider type."""
    scores = jnp.concatenate([jnp.ones((300, 1)), jnp.ones((300, 1))], 1).astype(jnp.bfloat16)
    scores = scores.at[0, 1].set(2)  # 300 against 301
    np.testing.assert_array_equal(jsp.make_mask(jsp.Channel(-1), scores, 0.5)[0], [False, True])


@hypothesis.given(st.floats(0, 1), st.integers(0, 1000))
def test_counts_are_those_of_numpy(density, size):
    assert kept_units(density, size) == int(np.rint(np.float64(density) * size))


def test_the_count_of_a_huge_leaf_is_exact():
    assert kept_units(0.1, 2**25 + 10) == 3355444  # float32 would say 3355443 or lower
    assert kept_units(0.5, 2**31 - 3) == 1073741822


@pytest.mark.parametrize("pattern", GROUPS, ids=repr)
def test_patterns_are_static_arguments(pattern):
    assert isinstance(pattern, jsp.Pattern)
    assert pattern in {pattern: 1} and eval(repr(pattern), vars(jsp)) == pattern


@pytest.mark.parametrize(
    "pattern",
    [
        jsp.Unstructured(ndim=3),
        jsp.FanIn(ndim=3),
        *[jsp.Channel(a, ndim=3) for a in (-1, -2, -3)],
        jsp.Unstructured(ndim=1),
        jsp.Channel(-1, ndim=1),
    ],
    ids=repr,
)
def test_weights_of_one_and_three_axes(pattern):
    testing.check_pattern(pattern, (3, 4, 5)[-pattern.ndim :])


def test_units_of_bf16_scores_are_summed_under_strict_promotion():
    scores = jnp.array([[1, 2, 4, 3]], jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        mask = jsp.make_mask(jsp.Block((1, 2)), scores, 0.5)
    assert mask.tolist() == [[False, False, True, True]]
