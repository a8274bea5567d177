"""Stored blocks that become fewer: which ones, when, and that `compact` changes nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as jsp
from jaxsparse.training._move_blocks import move_slots
from pallas_kernels import plan
from tests.conformance.lists import fast_jit

FINAL = jsp.uniform(0.75, jsp.Block((4, 4)), where="stack")
OPTIMIZERS = {  # inside sparsify, and what stands around
    "adam": (optax.adam(1e-2), lambda tx: tx),
    "accumulated": (
        optax.chain(optax.clip(1.0), optax.sgd(0.1, momentum=0.9)),
        lambda tx: optax.MultiSteps(tx, 2),
    ),
}


def test_blocks_by_hand():
    """4 rows x 2 columns; three slots of each column, of which two may stay, then one may move."""
    rows, cols = jnp.array([0, 1, 2, 3, 1, 4]), jnp.array([0, 0, 0, 1, 1, 1])  # the last is unused
    topology = plan(rows, cols, (4, 2), fan_in=3)
    values = jnp.array([3.0, 1.0, 2.0, 5.0, 0.5, 0.0])[:, None, None]
    scores = jnp.array([[0.0, 0.0], [9.0, 0.0], [1.0, 7.0], [0.0, 0.0]])
    quiet = move_slots(topology, values, scores, jnp.float32(0.0), 2)
    assert quiet.rows.tolist() == [0, 4, 2, 3, 1, 4]  # slot 1 is smallest in its column
    moved = move_slots(topology, values, scores, jnp.float32(0.25), 2)
    assert moved.rows.tolist() == [0, 4, 2, 3, 2, 4]  # then slot 4 is smallest of all
    one = move_slots(topology, values, scores, jnp.float32(0.5), 1)
    assert one.rows.tolist() == [4, 1, 4, 3, 4, 4]  # of 3 and 5, 3 leaves; row 1 comes back
    assert one.count == 2 and one.col_start.tolist() == [0, 1, 2]


def start(density=1.0, name="adam", **options):
    optimizer, wrap = OPTIMIZERS[name]
    params = {"stack": jax.random.normal(jax.random.key(1), (2, 16, 8)), "bias": jnp.ones(8)}
    values, blocks = jsp.blockify(params, FINAL, density=density)
    options = {
        "schedule": jsp.linear(0, 6),
        "when": jsp.every(2),
        "key": jax.random.key(2),
        **options,
    }
    updater = jsp.block_gradual(blocks, FINAL, **options)
    tx = wrap(jsp.sparsify(optimizer, updater))
    params = jsp.add_probes(values, blocks)

    @fast_jit
    def step(params, state, t):
        x = jax.random.normal(jax.random.fold_in(jax.random.key(3), t), (2, 6, 16))

        def loss(p):
            view = updater.view(p, inside(state))
            return jnp.mean((x @ view["stack"] + view["bias"] - jnp.roll(x[..., :8], 3, 1)) ** 2)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return params, tx, step, updater


def inside(state):
    leaves = jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, jsp.SparseState))
    return next(s.updater for s in leaves if isinstance(s, jsp.SparseState))


def held(state):
    topology = inside(state).blocks["stack"]
    return topology.used.reshape(2, 2, -1).sum(-1).tolist()


def test_counts_follow_the_schedule_and_end_exactly():
    params, tx, step, _ = start(schedule=jsp.linear(0, 5))
    state, counts = tx.init(params), []
    for t in range(7):
        params, state = step(params, state, t)
        assert held(state) == [[held(state)[0][0]] * 2] * 2
        counts.append(held(state)[0][0])
    # 4 (1 - 0.75 t / 5) at t = 0, 2, 4, and 1 at step 5, though `when` is not due.
    assert counts == [4, 4, 3, 3, 2, 1, 1]
    assert step._cache_size() == 1


def test_nothing_is_given_up_before_the_schedule_asks_for_it():
    params, tx, step, _ = start(density=0.5)
    state, counts = tx.init(params), []
    for t in range(7):
        params, state = step(params, state, t)
        counts.append(held(state)[0][0])
    assert counts == [2, 2, 2, 2, 2, 2, 1]  # 4, 3, 2 and 1 at t = 0, 2, 4, 6


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_after_compact_as_if_nothing_had_happened(name):
    params, tx, step, updater = start(name=name)
    state, at = tx.init(params), 10 if name == "accumulated" else 5
    for t in range(at):
        params, state = step(params, state, t)
    small, smaller = jsp.compact(tx, params, state)
    width = held(state)[0][0]
    assert width == 2 and small["stack"].values.shape == (2, 4, 4, 4)
    assert inside(smaller).blocks["stack"].fan_in == 2
    shapes = {leaf.shape for leaf in jax.tree.leaves(smaller)}
    assert (2, 8, 4, 4) not in shapes and (2, 8, 1, 1) not in shapes

    def dense(params, state):
        return updater.view(params, inside(state))["stack"].todense()

    np.testing.assert_array_equal(dense(small, smaller), dense(params, state))
    for t in range(at, at + 6):
        params, state = step(params, state, t)
        small, smaller = step(small, smaller, t)
        np.testing.assert_allclose(dense(small, smaller), dense(params, state), atol=1e-5)
    assert held(smaller) == held(state) == [[1, 1], [1, 1]]
    jsp.check(small, smaller)


def test_errors():
    def init(distribution, density=0.5):
        values, blocks = jsp.blockify({"stack": jnp.ones((16, 8))}, FINAL, density=density)
        options = {"schedule": jsp.constant(), "when": jsp.once(0), "key": jax.random.key(0)}
        jsp.block_gradual(blocks, distribution, **options).init(jsp.add_probes(values, blocks))

    with pytest.raises(ValueError, match=r"stack stores 1 blocks of each column, fewer than the 2"):
        init(jsp.uniform(0.5, jsp.Block((4, 4)), where="stack"), density=0.25)
    with pytest.raises(ValueError, match=r"stack is planned as Block\(shape=\(8, 4\)\)"):
        init(jsp.uniform(0.5, jsp.Block((8, 4)), where="stack"))
    with pytest.raises(ValueError, match="stack is planned as dense, but it is stored as Block"):
        init(jsp.uniform(0.5, jsp.Block((4, 4)), overrides={"stack": 0.0}))
    with pytest.raises(ValueError, match=r"density is the share of blocks to store.* got 0"):
        init(FINAL, density=0)
    tx = jsp.sparsify(optax.sgd(0.1), jsp.static(jsp.uniform(0.5), key=jax.random.key(0)))
    with pytest.raises(ValueError, match="this one has 0"):
        jsp.compact(tx, [jnp.ones((4, 4))], tx.init([jnp.ones((4, 4))]))
