"""Global and LAMP thresholds against numpy, on trees whose total is known."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import jaxsparse as jsp

SHAPES = {"a": (4, 8), "b": (2, 3, 5), "c": (16, 4)}  # b holds two slices
SIZE = 32 + 30 + 64


def tree_of(flat):
    """A vector cut into the leaves of SHAPES."""
    ends = np.cumsum([np.prod(s) for s in SHAPES.values()])[:-1]
    parts = np.split(np.asarray(flat, np.float32), ends)
    return {k: p.reshape(s) for (k, s), p in zip(SHAPES.items(), parts, strict=True)}


def flat(tree):
    return np.concatenate([np.asarray(tree[k]).reshape(-1) for k in SHAPES])


def slices(tree):
    """Each matrix of the tree, as numpy."""
    return [m for k in SHAPES for m in np.asarray(tree[k]).reshape(-1, *SHAPES[k][-2:])]


@functools.cache
def compiled(make, sparsity, **options):
    return jax.jit(lambda params: jsp.prune(params, make(sparsity, **options))[1])


def magnitudes(draw_order, seed):
    """Distinct magnitudes with signs, leaves of different scale, in a drawn order."""
    rng = np.random.default_rng(seed)
    return (1 + np.array(draw_order)) * rng.choice([-1, 1], SIZE)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
@hypothesis.given(order=st.permutations(range(SIZE)), seed=st.integers(0, 99))
def test_global_without_ties_is_the_global_argsort(sparsity, order, seed):
    weights = magnitudes(order, seed)
    keep = np.zeros(SIZE, bool)
    keep[np.argsort(-np.abs(weights))[: round((1 - sparsity) * SIZE)]] = True
    # The floor holds at least one weight in each slice; drawn orders where it would act are few.
    hypothesis.assume(all(m.any() for m in slices(tree_of(keep))))
    masks = compiled(jsp.global_, sparsity)(tree_of(weights))
    np.testing.assert_array_equal(flat(masks), keep)


@pytest.mark.parametrize("make", [jsp.global_, jsp.lamp])
@hypothesis.given(values=st.lists(st.integers(0, 4), min_size=SIZE, max_size=SIZE))
def test_the_total_is_exact_whatever_ties(make, values):
    masks = compiled(make, 0.6)(tree_of(values))
    assert flat(masks).sum() == round(0.4 * SIZE)
    assert all(m.any() for m in slices(masks))


@pytest.mark.parametrize("make", [jsp.global_, jsp.lamp])
def test_the_floor_keeps_every_slice_alive(make):
    scale = {"a": 1.0, "b": 1e-6, "c": 1e-12}
    rng = np.random.default_rng(0)
    params = {k: scale[k] * rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
    for floor, least in ((0.01, (1, 1, 1, 1)), (0.2, (6, 3, 3, 13))):
        masks = compiled(jsp.global_, 0.8, floor=floor)(params)
        counts = [int(m.sum()) for m in slices(masks)]
        assert sum(counts) == round(0.2 * SIZE)
        assert all(c >= low for c, low in zip(counts, least, strict=True))
    masks = compiled(make, 0.97)(params)
    assert all(m.any() for m in slices(masks))


def numpy_lamp(tree, keep):
    """Kept counts of each slice: one threshold over w^2 / (sum of w^2 that are no smaller)."""
    scores = []
    for m in slices(tree):
        squares = np.sort(np.square(m.reshape(-1).astype(np.float64)))
        tail = np.cumsum(squares[::-1])[::-1]
        scores.append(squares / tail)
    threshold = np.sort(np.concatenate(scores))[::-1][keep - 1]
    return [int((s >= threshold).sum()) for s in scores]


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
@pytest.mark.parametrize("seed", range(5))
def test_lamp_is_that_of_numpy(sparsity, seed):
    """On distinct magnitudes that bf16 holds exactly, histograms of 16 bits lose nothing."""
    rng = np.random.default_rng(seed)
    exact = np.arange(1.0, 2.0, 2**-7)[:, None] * 2.0 ** np.arange(-3, 4)  # 896 bf16 numbers
    values = rng.choice(exact.reshape(-1), SIZE, replace=False) * rng.choice([-1, 1], SIZE)
    tree = tree_of(values)
    keep = round((1 - sparsity) * SIZE)
    masks = compiled(jsp.lamp, sparsity)(tree)
    assert [int(m.sum()) for m in slices(masks)] == numpy_lamp(tree, keep)
    for w, m in zip(slices(tree), slices(masks), strict=True):
        assert np.abs(w)[m].min() > np.abs(w)[~m].max(initial=0)


def test_nm_and_overridden_leaves_stay_out_of_the_pool():
    rng = np.random.default_rng(1)
    params = {k: rng.normal(size=(8, 8)).astype(np.float32) for k in "abcd"}
    overrides = {"a": jsp.LeafPlan(jsp.NM(1, 4), 0.5), "b": 0.25}
    for make in (jsp.global_, jsp.lamp):
        masks = jsp.prune(params, make(0.75, overrides=overrides))[1]
        assert int(masks["a"].sum()) == 16 and int(masks["b"].sum()) == 48
        assert int(masks["c"].sum()) + int(masks["d"].sum()) == 32


@pytest.mark.parametrize("pattern", [jsp.Block((2, 2)), jsp.Channel(-1), jsp.Channel(-2)])
def test_units_of_several_weights_meet_the_total_up_to_one_unit(pattern):
    rng = np.random.default_rng(2)
    params = {"a": rng.normal(size=(8, 4)), "b": 3 * rng.normal(size=(2, 4, 6))}
    params = {k: v.astype(np.float32) for k, v in params.items()}
    for make in (jsp.global_, jsp.lamp):
        masks = jsp.prune(params, make(0.5, pattern))[1]
        kept = sum(int(m.sum()) for m in masks.values())
        assert abs(kept - 40) < 8  # 80 weights; the largest unit has 8


def test_fan_in_follows_the_threshold_with_equal_columns():
    rng = np.random.default_rng(3)
    params = {"a": rng.normal(size=(16, 4)), "b": 5 * rng.normal(size=(16, 4))}
    params = {k: v.astype(np.float32) for k, v in params.items()}
    masks = jsp.prune(params, jsp.global_(0.5, jsp.FanIn()))[1]
    columns = {k: np.unique(np.asarray(m).sum(0)) for k, m in masks.items()}
    assert all(len(c) == 1 for c in columns.values()) and columns["b"] > columns["a"]


def test_a_traced_share_gives_the_counts_of_a_number():
    """`gradual` asks with a traced share; the end is exactly the final total."""
    tree = tree_of(magnitudes(np.random.default_rng(4).permutation(SIZE), 0))
    updater = jsp.gradual(jsp.global_(0.5), schedule=jsp.linear(0, 2), when=jsp.every(1))
    state, kept = updater.init(tree), []
    update = jax.jit(updater.update)
    for _ in range(3):
        state = update(state, tree, tree, finite=jnp.array(True))
        kept.append(int(flat(state.masks).sum()))
    assert kept == [SIZE, round(0.75 * SIZE), round(0.5 * SIZE)]
    jax.tree.map(np.testing.assert_array_equal, state.masks, jsp.prune(tree, jsp.global_(0.5))[1])


def test_nan_scores_are_not_kept_and_do_not_count():
    params = {"a": jnp.array([[jnp.nan, 5.0, 4.0, 3.0]]), "b": jnp.array([[2.0, 1.0, 0.5, 0.25]])}
    masks = jsp.prune(params, jsp.global_(0.5))[1]
    np.testing.assert_array_equal(masks["a"], [[False, True, True, True]])
    np.testing.assert_array_equal(masks["b"], [[True, False, False, False]])
