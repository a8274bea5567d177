"""Masks that are n:m along both axes, against brute force and a linear program."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import linprog

import jaxsparse as jsp
from jaxsparse._regular import regular_patterns


def all_regular(m, n):
    """Every 0/1 matrix with n in each row and column, by trying all of them."""
    rows = [r for r in itertools.product([0, 1], repeat=m) if sum(r) == n]
    squares = np.array(list(itertools.product(rows, repeat=m)))
    return squares[(squares.sum(1) == n).all(-1)]


@pytest.mark.parametrize(
    ("m", "counts"), [(2, [1, 2, 1]), (3, [1, 6, 6, 1]), (4, [1, 24, 90, 24, 1])]
)
def test_the_table_holds_every_pattern_once(m, counts):
    table = regular_patterns(m)
    assert len(np.unique(table.reshape(len(table), -1), axis=0)) == len(table) == sum(counts)
    for n, count in enumerate(counts):
        assert len(all_regular(m, n)) == (table.sum((1, 2)) == n * m).sum() == count


@pytest.mark.parametrize("n", [1, 2, 3])
def test_each_4_by_4_keeps_the_best_of_all_patterns(n):
    w = np.random.default_rng(n).normal(size=(2, 12, 20)).astype(np.float32)
    mask = np.asarray(jsp.make_mask(jsp.TransposableNM(n, 4), jnp.abs(w), n / 4))
    squares = np.abs(w).reshape(2, 3, 4, 5, 4).swapaxes(2, 3).reshape(-1, 1, 4, 4)
    kept = mask.reshape(2, 3, 4, 5, 4).swapaxes(2, 3).reshape(-1, 4, 4)
    sums = (squares * all_regular(4, n)).sum((2, 3))
    np.testing.assert_array_equal(kept, all_regular(4, n)[sums.argmax(1)])


def test_equal_scores_keep_the_earliest_and_infinite_ones_rank():
    even = jsp.make_mask(jsp.TransposableNM(2, 4), jnp.ones((4, 4)), 0.5)
    assert even.astype(int).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    scores = jnp.array([[jnp.inf, 9.0], [9.0, -jnp.inf]])
    mask = jsp.make_mask(jsp.TransposableNM(1, 2), scores, 0.5)
    assert mask.astype(int).tolist() == [[0, 1], [1, 0]]  # no -inf before many inf
    scores = jnp.zeros((4, 4)).at[0, 0].set(jnp.inf).at[1, 1].set(1e-6)
    mask = jsp.make_mask(jsp.TransposableNM(1, 4), scores, 0.25)
    assert bool(mask[0, 0] & mask[1, 1])  # an infinity does not drown what is finite


@pytest.mark.parametrize(("n", "m"), [(2, 8), (4, 8), (3, 5)])
def test_larger_squares_are_full_and_near_the_optimum(n, m):
    w = np.random.default_rng(m).exponential(size=(4 * m, 2 * m)).astype(np.float32)
    mask = np.asarray(jsp.make_mask(jsp.TransposableNM(n, m), w, n / m))
    squares = w.reshape(4, m, 2, m).swapaxes(1, 2).reshape(-1, m, m)
    kept = mask.reshape(4, m, 2, m).swapaxes(1, 2).reshape(-1, m, m)
    assert (kept.sum(1) == n).all() and (kept.sum(2) == n).all()
    lines = np.concatenate([np.kron(np.eye(m), np.ones(m)), np.kron(np.ones(m), np.eye(m))])
    best = [-linprog(-s.ravel(), A_eq=lines, b_eq=[n] * 2 * m, bounds=(0, 1)).fun for s in squares]
    ratio = (squares * kept).sum((1, 2)) / best
    assert ratio.max() <= 1 + 1e-6 and ratio.min() > 0.9 and ratio.mean() > 0.95


def test_a_deadlock_of_greed_is_filled():
    """Greed takes the left block whole, and rows 2 and columns 2 are left with one another."""
    scores = np.ones((5, 5), np.float32)
    scores[:4, :4] = 9  # 2 of each of these rows and columns; then (4, 4) alone is free, and short
    mask = np.asarray(jsp.make_mask(jsp.TransposableNM(2, 5), scores, 0.4))
    assert (mask.sum(0) == 2).all() and (mask.sum(1) == 2).all()


def test_it_plans_as_n_to_m_and_moves_under_rigl():
    plan = jsp.uniform(0.9, jsp.TransposableNM(2, 4))
    params = {"w": jax.random.normal(jax.random.key(0), (8, 8))}
    assert plan(params)["w"].sparsity == 0.5
    updater = jsp.rigl(plan, key=jax.random.key(1), when=jsp.every(1), drop_fraction=0.5)
    tx = jsp.sparsify(optax.sgd(0.1), updater)
    state = tx.init(params)
    grads = {"w": jax.random.normal(jax.random.key(2), (8, 8))}
    new = jsp.masks(jax.jit(tx.update)(grads, state, params)[1])["w"]
    squares = np.asarray(new).reshape(2, 4, 2, 4)
    assert (squares.sum(1) == 2).all() and (squares.sum(3) == 2).all()
    assert (new != jsp.masks(state)["w"]).any()


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"TransposableNM\(n=2, m=4\) needs .* multiples of 4"):
        jsp.make_mask(jsp.TransposableNM(2, 4), jnp.ones((8, 6)), 0.5)
    with pytest.raises(ValueError, match="0 < n <= m"):
        jsp.TransposableNM(5, 4)
